"""GHND: generalised head network distillation, for detectors split between a device and a server.

Matsubara and Levorato, "Neural Compression and Filtering for Edge-assisted Real-time Object Detection
in Challenged Networks", ICPR 2020, arXiv 2007.15818. With F_i the output of stage i after its last ReLU,
padding included:

    L = sum over i of w_i * sum over (n, c, h, w) of (F_i^S - F_i^T)^2

a sum, not a mean: with pixels of 800x1333 images it starts at about 1.6e7 per image. Its predecessor
HND has the first stage alone (IN_FEATURES ["res2"]). The student is usually a copy of its teacher whose
first stage is a bottleneck (projects/GHND), and nothing else is trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..views import Batch, DetectorView
from .base import DISTILL_LOSS_REGISTRY, DistillLoss, check_setting
from .pairing import FeaturePairs


@DISTILL_LOSS_REGISTRY.register()
class GHND(DistillLoss):
    """Summed squared error of backbone stages; keys in MODEL.DISTILLER.GHND."""

    NODE = "GHND"

    def __init__(
        self,
        *,
        in_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        stage_weights: Sequence[float] = (),
        **schedule,
    ):
        """
        Args:
            in_features: backbone stages (or neck levels) by name.
            stage_weights: w_i of each of them; empty: 1.
            schedule: weight, start_iter, stop_iter, warmup_iters of DistillLoss.

        Raises:
            ValueError: stage_weights are not as many as in_features, or not all finite from 0.
        """
        super().__init__(**schedule)
        self.pairs = FeaturePairs(in_features, key="MODEL.DISTILLER.GHND.IN_FEATURES")
        self.stage_weights = list(stage_weights)
        numbers = all(isinstance(w, (int, float)) and 0 <= w < math.inf for w in self.stage_weights)
        fits = numbers and len(self.stage_weights) in (0, len(in_features))
        expected = "a finite number, 0 or more, for each of IN_FEATURES"
        check_setting("GHND", "stage_weights", stage_weights, fits, expected)

    def forward(
        self, student: DetectorView, teacher: DetectorView, batch: Batch
    ) -> dict[str, torch.Tensor]:
        """{"loss_ghnd_<stage>": scalar} per stage; maps are (N, C, H, W), float32."""
        pairs = self.pairs(student, teacher)
        weights = self.stage_weights or [1.0] * len(pairs)
        return {
            f"loss_ghnd_{name}": weight * F.mse_loss(ours, theirs, reduction="sum")
            for weight, (name, (ours, theirs)) in zip(weights, pairs.items())
        }
