"""FeatureMimic: the student's feature maps imitate the teacher's, element by element.

FitNets (Romero et al., ICLR 2015, arXiv 1412.6550, eq. 3) applied to the levels of a detector:

    L = mean over levels of mean over (N, C, H, W) of distance(norm(adapter(s)), norm(t))

with the distance |s - t|^2 ("L2"), |s - t| ("L1") or its smooth form with beta 1 ("smoothL1").
Without normalisation the level with the largest activations rules the loss; "channel" standardises
each channel over (N, H, W) (as PKD does), "level" the whole map with one mean and deviation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..views import Batch, DetectorView
from .base import DISTILL_LOSS_REGISTRY, DistillLoss, check_choices
from .pairing import FeaturePairs

_DISTANCES = {"L2": F.mse_loss, "L1": F.l1_loss, "smoothL1": F.smooth_l1_loss}
_NORM_DIMS = {"none": None, "channel": (0, 2, 3), "level": (0, 1, 2, 3)}
_EPS = 1e-6


@DISTILL_LOSS_REGISTRY.register()
class FeatureMimic(DistillLoss):
    """Distance between feature maps; keys in MODEL.DISTILLER.FEATURE_MIMIC."""

    NODE = "FEATURE_MIMIC"

    def __init__(
        self,
        *,
        in_features: Sequence[str] = (),
        loss_form: str = "L2",
        normalize: str = "none",
        **schedule,
    ):
        """
        Args:
            in_features: neck levels or bottom-up stages by name; empty: all common neck levels.
            loss_form: "L2", "L1" or "smoothL1".
            normalize: "none", "channel" or "level".
            schedule: weight, start_iter, stop_iter, warmup_iters of DistillLoss.

        Raises:
            ValueError: unknown loss_form or normalize.
        """
        super().__init__(**schedule)
        check_choices(self.NODE, loss_form=(loss_form, _DISTANCES), normalize=(normalize, _NORM_DIMS))
        self.pairs = FeaturePairs(in_features)
        self.distance = _DISTANCES[loss_form]
        self.norm_dims = _NORM_DIMS[normalize]

    def forward(
        self, student: DetectorView, teacher: DetectorView, batch: Batch
    ) -> dict[str, torch.Tensor]:
        """{"loss_feature_mimic": scalar}; student and teacher maps are (N, C, H, W) per level."""
        losses = [self._level(s, t) for s, t in self.pairs(student, teacher).values()]
        return {"loss_feature_mimic": torch.stack(losses).mean()}

    def _level(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        if self.norm_dims is not None:
            student, teacher = self._standardise(student), self._standardise(teacher)
        return self.distance(student, teacher)

    def _standardise(self, feature: torch.Tensor) -> torch.Tensor:
        variance, mean = torch.var_mean(feature, self.norm_dims, unbiased=False, keepdim=True)
        return (feature - mean) * (variance + _EPS).rsqrt()
