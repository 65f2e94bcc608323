"""FeatureMimic: the student's feature maps imitate the teacher's, element by element.

FitNets (Romero et al., ICLR 2015, arXiv 1412.6550, eq. 3) applied to the levels of a detector:

    L = mean over levels of mean over (N, C, H, W) of distance(norm(adapter(s)), norm(t))

with the distance |s - t|^2 ("L2"), |s - t| ("L1") or its smooth form with beta 1 ("smoothL1").
Without normalization the level with the largest activations dominates; "channel" standardizes
each channel over (N, H, W) (as PKD does), "level" the whole map with one mean and deviation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..views import Batch, DetectorView
from .base import DISTILL_LOSS_REGISTRY, DistillLoss
from .pairing import FeaturePairs
from .settings import IN_FEATURES, LossSettings, key

_DISTANCES = {"L2": F.mse_loss, "L1": F.l1_loss, "smoothL1": F.smooth_l1_loss}
_NORM_DIMS = {"none": None, "channel": (0, 2, 3), "level": (0, 1, 2, 3)}
_EPS = 1e-6


@dataclass(frozen=True)
class FeatureMimicSettings(LossSettings):
    in_features: Sequence[str] = key((), IN_FEATURES)
    loss_form: str = key("L2", "Distance of two elements.", choices=_DISTANCES)
    normalize: str = key(
        "none", "Standardize both maps first, each channel or level.", choices=_NORM_DIMS
    )


@DISTILL_LOSS_REGISTRY.register()
class FeatureMimic(DistillLoss):
    """Distance between feature maps; keys in MODEL.DISTILLER.FEATURE_MIMIC."""

    NODE = "FEATURE_MIMIC"
    Settings = FeatureMimicSettings
    settings: FeatureMimicSettings

    def __init__(self, **keys: Any):
        super().__init__(**keys)
        self.pairs = FeaturePairs(self.settings.in_features)
        self.distance = _DISTANCES[self.settings.loss_form]
        self.norm_dims = _NORM_DIMS[self.settings.normalize]

    def forward(
        self, student: DetectorView, teacher: DetectorView, batch: Batch
    ) -> dict[str, torch.Tensor]:
        """{"loss_feature_mimic": scalar}; student and teacher maps are (N, C, H, W) per level."""
        losses = [self._level(s, t) for s, t in self.pairs(student, teacher).values()]
        return {"loss_feature_mimic": torch.stack(losses).mean()}

    def _level(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        if self.norm_dims is not None:
            student, teacher = self._standardize(student), self._standardize(teacher)
        return self.distance(student, teacher)

    def _standardize(self, feature: torch.Tensor) -> torch.Tensor:
        variance, mean = torch.var_mean(feature, self.norm_dims, unbiased=False, keepdim=True)
        return (feature - mean) * (variance + _EPS).rsqrt()
