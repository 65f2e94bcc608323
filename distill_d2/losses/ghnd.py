"""GHND: generalized head network distillation, for detectors split between a device and a server.

Matsubara and Levorato, "Neural Compression and Filtering for Edge-assisted Real-time Object Detection
in Challenged Networks", ICPR 2020, arXiv 2007.15818. With F_i the output of stage i after its last ReLU,
padding included:

    L = sum over i of w_i * sum over (n, c, h, w) of (F_i^S - F_i^T)^2

a sum, not a mean: with pixels of 800x1333 images it starts at about 1.6e7 per image. Its predecessor
HND has the first stage alone (IN_FEATURES ["res2"]). The student is usually a copy of its teacher whose
first stage is a bottleneck (projects/GHND), and nothing else is trained.
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
from .settings import IN_FEATURES, LossSettings, is_finite, key


@dataclass(frozen=True)
class GHNDSettings(LossSettings):
    in_features: Sequence[str] = key(("res2", "res3", "res4", "res5"), IN_FEATURES)
    stage_weights: Sequence[float] = key((), "w_i, one for each of IN_FEATURES; empty: 1.")

    def __post_init__(self) -> None:
        super().__post_init__()
        numbers = all(is_finite(w) and w >= 0 for w in self.stage_weights)
        fits = numbers and len(self.stage_weights) in (0, len(self.in_features))
        self.require("stage_weights", fits, "a finite number, at least 0, for each of IN_FEATURES")


@DISTILL_LOSS_REGISTRY.register()
class GHND(DistillLoss):
    """Summed squared error of backbone stages; keys in MODEL.DISTILLER.GHND."""

    NODE = "GHND"
    Settings = GHNDSettings
    settings: GHNDSettings

    def __init__(self, **keys: Any):
        super().__init__(**keys)
        self.pairs = FeaturePairs(self.settings.in_features, key=self.config_key("in_features"))

    def forward(
        self, student: DetectorView, teacher: DetectorView, batch: Batch
    ) -> dict[str, torch.Tensor]:
        """{"loss_ghnd_<stage>": scalar} per stage; maps are (N, C, H, W), float32."""
        pairs = self.pairs(student, teacher)
        weights = self.settings.stage_weights or [1.0] * len(pairs)
        return {
            f"loss_ghnd_{name}": weight * F.mse_loss(s, t, reduction="sum")
            for weight, (name, (s, t)) in zip(weights, pairs.items())
        }
