"""FGD: focal and global distillation.

Yang et al., "Focal and Global Knowledge Distillation for Detectors", CVPR 2022, arXiv 2111.11837. With the
attentions A_s (N, H, W) and A_c (N, C) of a map at temperature T, d = s - t, and masks from the ground truth,

    D  = A_s(t) sum_c A_c(t) d^2,     fg = sum M_fg D / N,     bg = sum M_bg D / N
    at = (sum |A_c(s) - A_c(t)| + sum |A_s(s) - A_s(t)|) / N
    global = sum (R_s(s) - R_t(t))^2 / N
    L  = sum over levels of (FG_WEIGHT fg + BG_WEIGHT bg + AT_WEIGHT at + GLOBAL_WEIGHT global)

M_fg is 1 / (cells of the smallest box there), M_bg 1 / (cells without a box), see ``inverse_area_mask``;
R(x) = x + delta(x) is a trained global context block (GCNet), one for each detector and level.

Weights (fg, bg, at, global) of the released configs, for C = 256: RetinaNet 1e-3, 5e-4, 5e-4, 5e-6 with T 0.5,
the default (at 1e-3 in the paper); Faster and Mask R-CNN 5e-5, 2.5e-5, 5e-5, 5e-7; FCOS 1.6e-3, 8e-4, 8e-4, 8e-6
with T 0.8 (at 8e-3 in the paper). The authors' code stretches boxes of padded images: REFERENCE_BUGS.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..upload import upload
from ..views import Batch, DetectorView
from .attention import attentions
from .base import DISTILL_LOSS_REGISTRY
from .masks import Size, inverse_area_mask
from .neck import LevelTerms, NeckLoss
from .pairing import FeaturePairs, level_modules
from .regions import weighted_distances
from .settings import IN_FEATURES, LossSettings, key


class ContextBlock(nn.Module):
    """What GCNet's context block adds to each cell of a map (N, C, H, W), delta: (N, C)."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(channels // 2, 1)
        self.mask = nn.Conv2d(channels, 1, 1)
        nn.init.normal_(self.mask.weight, std=math.sqrt(2 / channels))  # its bias has no effect
        first, last = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        self.add = nn.Sequential(first, nn.LayerNorm(hidden), nn.ReLU(), last)

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        weights = self.mask(feature).flatten(1).softmax(dim=1)
        return self.add((feature.flatten(2) @ weights[..., None])[..., 0])


@dataclass(frozen=True)
class FGDSettings(LossSettings):
    in_features: Sequence[str] = key((), IN_FEATURES)
    temperature: float = key(0.5, "T of both attentions.", above=0)
    fg_weight: float = key(1e-3, "Weight of differences in objects.", at_least=0)
    bg_weight: float = key(5e-4, "Weight of differences in the background.", at_least=0)
    at_weight: float = key(5e-4, "Weight of the difference of attentions.", at_least=0)
    global_weight: float = key(5e-6, "Weight of the difference of global contexts.", at_least=0)
    reference_bugs: bool = key(False, "Boxes are drawn as in the authors' code.")


@DISTILL_LOSS_REGISTRY.register()
class FGD(NeckLoss):
    """Focal and global distillation; keys in MODEL.DISTILLER.FGD."""

    NODE = "FGD"
    Settings = FGDSettings
    settings: FGDSettings
    of_student: nn.ModuleDict  # from bind on, as of_teacher

    def __init__(self, **keys: Any):
        super().__init__(**keys)
        self.pairs = FeaturePairs(self.settings.in_features)

    def bind(self, student: DetectorView, teacher: DetectorView) -> None:
        super().bind(student, teacher)
        self.of_student = level_modules(self.pairs, lambda channels, _: ContextBlock(channels))
        self.of_teacher = level_modules(self.pairs, lambda _, channels: ContextBlock(channels))

    def level_terms(self, student: DetectorView, teacher: DetectorView, batch: Batch) -> LevelTerms:
        """fg, bg, at and global of each level."""
        pairs = self.pairs(student, teacher).items()
        return {name: self._level(name, s, t, batch) for name, (s, t) in pairs}

    @torch.no_grad()
    def masks(self, batch: Batch, level: str, size: Size) -> tuple[torch.Tensor, torch.Tensor]:
        """M_fg and M_bg of a level of this (H, W): (N, H, W) each."""
        truth, stride, scales = batch.truth, self.pairs.strides[level], None
        if self.settings.reference_bugs:
            sizes = [(size[1] / width, size[0] / height) for height, width in batch.image_sizes]
            scales = upload(torch.tensor(sizes), truth.boxes.device)
        foreground = inverse_area_mask(truth.boxes, truth.valid, size, stride, scales)
        background = (foreground <= 0).float()
        return foreground, background / background.sum(dim=(1, 2), keepdim=True).clamp(min=1)

    def _level(
        self, name: str, s: torch.Tensor, t: torch.Tensor, batch: Batch
    ) -> dict[str, torch.Tensor]:
        images, _, height, width = s.shape
        foreground, background = self.masks(batch, name, (height, width))
        of_s, of_t = (attentions(x, self.settings.temperature) for x in (s, t))
        cells, squares, sums = weighted_distances(s, t, of_t[1])
        cells = cells * of_t[0]
        delta = self.of_student[name](s) - self.of_teacher[name](t)
        context = squares + (delta * (2 * sums + height * width * delta)).sum()
        return {
            "fg": (foreground * cells).sum() / images,
            "bg": (background * cells).sum() / images,
            "at": sum((a - b).abs().sum() for a, b in zip(of_s, of_t)) / images,
            "global": context / images,
        }
