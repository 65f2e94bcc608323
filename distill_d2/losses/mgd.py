"""MGD: masked generative distillation.

Yang et al., "Masked Generative Distillation", ECCV 2022, arXiv 2205.01529. On each level, for maps s (after an
adapter where channels differ) and t, of N images,

    L = sum over levels of sum (y - t)^2 / N,   y = conv3x3(relu(conv3x3(s kept)))

where kept is 0 at a share MASK_RATIO of the cells, drawn anew for each level and step, and 1 at the others: a
trained generator makes the teacher's whole map from the cells that are left. No ground truth is read.

(WEIGHT, MASK_RATIO) of the released configs: one-stage detectors 2e-5, 0.65, the default; Faster and Mask R-CNN
5e-7, 0.45. They are for C = 256 and whole images: L is a sum over channels and cells. The authors' code draws on
the CPU with the program's random numbers; here they are the loss's own, by seed, process, level and iteration, so
that a resumed run draws the same and other random numbers do not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..views import Batch, DetectorView
from .base import DISTILL_LOSS_REGISTRY
from .neck import LevelTerms, NeckLoss
from .pairing import FeaturePairs, level_modules
from .randomness import generator_of
from .settings import IN_FEATURES, LossSettings, key


def generator(channels: int) -> nn.Sequential:
    """Two 3x3 convolutions, which see the cells around a hidden one."""
    first, last = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
    return nn.Sequential(first, nn.ReLU(inplace=True), last)


@dataclass(frozen=True)
class MGDSettings(LossSettings):
    in_features: Sequence[str] = key((), IN_FEATURES)
    weight: float = key(2e-5, "Of a sum over channels and cells: one-stage; two-stage 5e-7.", at_least=0)
    mask_ratio: float = key(
        0.65, "Share of the cells that are hidden; two-stage 0.45.", at_least=0, below=1
    )


@DISTILL_LOSS_REGISTRY.register()
class MGD(NeckLoss):
    """Masked generative distillation; keys in MODEL.DISTILLER.MGD."""

    NODE = "MGD"
    Settings = MGDSettings
    settings: MGDSettings
    generation: nn.ModuleDict  # from bind on

    def __init__(self, **keys: Any):
        super().__init__(**keys)
        self.pairs = FeaturePairs(self.settings.in_features)

    def bind(self, student: DetectorView, teacher: DetectorView) -> None:
        super().bind(student, teacher)
        self.generation = level_modules(self.pairs, lambda _, channels: generator(channels))

    def level_terms(self, student: DetectorView, teacher: DetectorView, batch: Batch) -> LevelTerms:
        """The one term of each level."""
        pairs = self.pairs(student, teacher).items()
        return {name: {"": self._level(name, s, t, batch.iteration)} for name, (s, t) in pairs}

    def _level(self, level: str, s: torch.Tensor, t: torch.Tensor, iteration: int) -> torch.Tensor:
        made = self.generation[level](s * self.kept(level, s, iteration))
        return F.mse_loss(made, t, reduction="sum") / len(t)

    def kept(self, level: str, feature: torch.Tensor, iteration: int) -> torch.Tensor:
        """(N, 1, H, W): 0 at the cells of a map (N, C, H, W) that are hidden in this iteration, else 1."""
        drawn = self.uniform(level, feature, iteration)
        return (drawn <= 1 - self.settings.mask_ratio).to(feature.dtype)

    def uniform(self, level: str, feature: torch.Tensor, iteration: int) -> torch.Tensor:
        """(N, 1, H, W) in [0, 1), of this process, level and iteration."""
        device, (images, _, height, width) = feature.device, feature.shape
        numbers = generator_of(iteration, f"mgd {level}", device)
        return torch.rand((images, 1, height, width), generator=numbers, device=device)
