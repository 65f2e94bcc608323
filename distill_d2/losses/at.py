"""AT: the student's spatial attention imitates the teacher's.

Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv 1612.03928. For maps s, t of
a level, of any numbers of channels,

    L = sum over levels of mean over N H W of (v(s) - v(t))^2,   v(x) = a / |a|,  a = mean_c x^2

with the L2 norm of an image's a over its H W cells. The paper's sum has a norm in place of the mean; its
code has this mean, with 1000 over the number of levels as weight, here 200 for the five levels of one-stage
detectors (250 for the four of two-stage ones). The paper's models classify; no result on detection was
published.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..views import Batch, DetectorView
from .base import DISTILL_LOSS_REGISTRY
from .neck import LevelTerms, NeckLoss
from .pairing import FeaturePairs
from .settings import IN_FEATURES, LossSettings, key

_EPS = 1e-12


def normalized_attention(feature: torch.Tensor) -> torch.Tensor:
    """The mean of squares over channels of a map (N, C, H, W), of norm 1 per image, or 0: (N, H, W)."""
    squares = feature.square().mean(dim=1)
    return F.normalize(squares.flatten(1), dim=1, eps=_EPS).view_as(squares)


@dataclass(frozen=True)
class ATSettings(LossSettings):
    in_features: Sequence[str] = key((), IN_FEATURES)
    weight: float = key(200.0, "1000 over the number of levels in the paper's code.", at_least=0)


@DISTILL_LOSS_REGISTRY.register()
class AT(NeckLoss):
    """Attention transfer; keys in MODEL.DISTILLER.AT."""

    NODE = "AT"
    Settings = ATSettings
    settings: ATSettings

    def __init__(self, **keys: Any):
        super().__init__(**keys)
        self.pairs = FeaturePairs(self.settings.in_features, adapt=False)

    def level_terms(self, student: DetectorView, teacher: DetectorView, batch: Batch) -> LevelTerms:
        """The one term of each level."""
        return {name: {"": self._level(*maps)} for name, maps in self.pairs(student, teacher).items()}

    def _level(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(normalized_attention(student), normalized_attention(teacher))
