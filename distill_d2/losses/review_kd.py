"""ReviewKD: each level of the student, joined with the coarser ones, imitates the teacher's.

Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv 2104.09044. From the coarsest level to
the finest, with y of the level before, resized (nearest), BN by the statistics of the batch,

    x = BN(conv1x1(s));   (a, b) = sigmoid(conv1x1([x, y]));   x = a x + b y;   out = BN(conv3x3(x));   y = x

(the coarsest level has no y), and with d = out - t, pools p_k to k x k cells for those k of 4, 2, 1 that are
below the level's height, and weights w of 1/2, 1/4, 1/8 in the order of the pools taken,

    L = sum over levels of (mean d^2 + sum_k w_k mean p_k(d)^2) / (1 + sum_k w_k)

WEIGHT of the authors' configs, which are detectron2's: RetinaNet and Faster R-CNN, R50 from R101, 1.0, the
default; R18 from R101 1.2, MobileNetV2 from R50 2.0; Mask R-CNN 0.8, 1.5, 1.0. Their code pairs levels by their
place, and has 256 channels and five levels fixed; BN has running statistics there, which nothing reads.
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
from .norms import SYNC_NORM, BatchStatisticsNorm
from .pairing import FeaturePairs, Pairs
from .settings import IN_FEATURES, LossSettings, key

_POOLS = (4, 2, 1)


class Fusion(nn.Module):
    """Joins a level with the coarser ones (ABF, attention based fusion)."""

    def __init__(self, channels: int, inputs: int, outputs: int, coarsest: bool, synchronized: bool):
        # inputs, outputs: channels of the student's and the teacher's map.
        super().__init__()
        self.first = _convolution(inputs, channels, 1, synchronized)
        self.attention = None if coarsest else nn.Conv2d(2 * channels, 2, 1)
        self.last = _convolution(channels, outputs, 3, synchronized)

    def join(self, feature: torch.Tensor, coarser: torch.Tensor | None) -> torch.Tensor:
        """(N, channels, H, W) of the student's map and the joined one of the level before."""
        x = self.first(feature)
        if self.attention is None or coarser is None:
            return x
        size, (of_x, of_y) = x.shape[-2:], self.attention.weight.chunk(2, dim=1)
        # Of the coarser map before it is resized: the same numbers, and no copy of both maps.
        logits = F.conv2d(x, of_x, self.attention.bias) + F.interpolate(F.conv2d(coarser, of_y), size)
        a, b = logits.sigmoid().chunk(2, dim=1)
        return a * x + b * F.interpolate(coarser, size)


def _convolution(inputs: int, outputs: int, size: int, synchronized: bool) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    return nn.Sequential(convolution, BatchStatisticsNorm(outputs, synchronized=synchronized))


def hierarchical_distance(made: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The mean of squares of a difference and of its pools (HCL, hierarchical context loss)."""
    difference = made - teacher
    total, weight, weights = difference.square().mean(), 1.0, 1.0
    for side in _POOLS:
        if side < difference.shape[-2]:
            weight /= 2
            weights += weight
            total = total + weight * F.adaptive_avg_pool2d(difference, side).square().mean()
    return total / weights


@dataclass(frozen=True)
class ReviewKDSettings(LossSettings):
    in_features: Sequence[str] = key((), IN_FEATURES)
    channels: int = key(256, "Of the joined maps.", at_least=1)
    sync_norm: bool = key(False, SYNC_NORM)


@DISTILL_LOSS_REGISTRY.register()
class ReviewKD(NeckLoss):
    """Knowledge review; keys in MODEL.DISTILLER.REVIEW_KD."""

    NODE = "REVIEW_KD"
    Settings = ReviewKDSettings
    settings: ReviewKDSettings
    fusions: nn.ModuleDict  # from bind on; from the coarsest level to the finest

    def __init__(self, **keys: Any):
        super().__init__(**keys)
        self.pairs = FeaturePairs(self.settings.in_features, adapt=False)

    def bind(self, student: DetectorView, teacher: DetectorView) -> None:
        super().bind(student, teacher)
        s, strides, channels = self.settings, self.pairs.strides, self.pairs.level_channels
        levels = sorted(strides, key=lambda name: strides[name], reverse=True)
        self.fusions = nn.ModuleDict()
        for name in levels:
            coarsest = name == levels[0]
            self.fusions[name] = Fusion(s.channels, *channels[name], coarsest, s.sync_norm)

    def level_terms(self, student: DetectorView, teacher: DetectorView, batch: Batch) -> LevelTerms:
        """The one term of each level."""
        pairs = self.made(student, teacher).items()
        return {name: {"": hierarchical_distance(*maps)} for name, maps in pairs}

    def made(self, student: DetectorView, teacher: DetectorView) -> Pairs:
        """What is made of the student's maps, and the teacher's map, by level name."""
        pairs, coarser, made = self.pairs(student, teacher), None, {}
        for name in self.fusions:
            fusion: Any = self.fusions[name]
            s, t = pairs[name]
            coarser = fusion.join(s, coarser)
            made[name] = fusion.last(coarser), t
        return made
