"""PKD: Pearson-correlation distillation of feature maps.

Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation
Coefficient", NeurIPS 2022, arXiv 2207.02039. Per level, with every channel standardized over
(N, H, W), x^ = (x - mean(x)) / (std(x) + 1e-6), std unbiased:

    L = mean(|s^ - t^|^2) / 2  ~  1 - r,   r the Pearson correlation of s and t per channel

summed over levels. The paper weighs it 10 for one-stage and 6 for two-stage teachers. It does not
depend on the scale of either network's activations, so teachers of other kinds can be used. Statistics
are over the process's own batch and include the padding, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..views import Batch, DetectorView
from .base import DISTILL_LOSS_REGISTRY, DistillLoss
from .pairing import FeaturePairs
from .settings import IN_FEATURES, LossSettings, key

_EPS = 1e-6
_OVER = (0, 2, 3)


class _PearsonDistance(torch.autograd.Function):
    """mean(|s^ - t^|^2) / 2 in closed form from five sums per channel.

    With a = std(s) + eps, b = std(t) + eps, m = N*H*W, c = x - mean(x), X = sum(c_s c_t):
    L = sum over channels of [(m-1) var(s)/a^2 + (m-1) var(t)/b^2 - 2X/(ab)] / (2 C m), and
    dL/ds = p c_s - q c_t with p = [eps/a^3 + X/((m-1) std(s) a^2 b)]/(C m), q = 1/(a b C m).
    Autograd on the plain formula keeps ten maps of the features' size; this keeps none of its own.
    """

    @staticmethod
    def forward(ctx, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        count = student.numel() // student.shape[1]
        freedom = max(count - 1, 1)
        mean_s, mean_t = (x.mean(_OVER, keepdim=True) for x in (student, teacher))
        centered_s, centered_t = student - mean_s, teacher - mean_t
        squares_s = (centered_s * centered_s).sum(_OVER, keepdim=True)
        squares_t = (centered_t * centered_t).sum(_OVER, keepdim=True)
        cross = (centered_s * centered_t).sum(_OVER, keepdim=True)
        std_s, std_t = (squares_s / freedom).sqrt(), (squares_t / freedom).sqrt()
        a, b = std_s + _EPS, std_t + _EPS
        scale = 1.0 / student.numel()
        p = (_EPS / a**3 + cross / (freedom * std_s) / (a * a * b)) * scale
        q = scale / (a * b)
        # Where c is 0 up to rounding (a constant channel, a 1x1 map): neither 0/0 nor c / eps.
        p = torch.where(_varies(std_s, mean_s), p, torch.zeros_like(p))
        q = torch.where(_varies(std_t, mean_t), q, torch.zeros_like(q))
        ctx.save_for_backward(student, teacher, p, q, q * mean_t - p * mean_s)
        return 0.5 * scale * (squares_s / a**2 + squares_t / b**2 - 2 * cross / (a * b)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: torch.Tensor):
        student, teacher, p, q, shift = ctx.saved_tensors
        grad = torch.addcmul(shift * grad_output, student, p * grad_output)
        return grad.addcmul_(teacher, q * grad_output, value=-1), None


def _varies(std: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    return std > 8 * torch.finfo(std.dtype).eps * mean.abs()


def pearson_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """PKD's distance of two maps (N, C, H, W), float32: a scalar, differentiable in ``student``."""
    return _PearsonDistance.apply(student, teacher)


@dataclass(frozen=True)
class PKDSettings(LossSettings):
    in_features: Sequence[str] = key((), IN_FEATURES)
    weight: float = key(6.0, "6 for two-stage, 10 for one-stage teachers in the paper.", at_least=0)


@DISTILL_LOSS_REGISTRY.register()
class PKD(DistillLoss):
    """Pearson correlation of feature maps; keys in MODEL.DISTILLER.PKD."""

    NODE = "PKD"
    Settings = PKDSettings
    settings: PKDSettings

    def __init__(self, **keys: Any):
        super().__init__(**keys)
        self.pairs = FeaturePairs(self.settings.in_features)

    def forward(
        self, student: DetectorView, teacher: DetectorView, batch: Batch
    ) -> dict[str, torch.Tensor]:
        """{"loss_pkd": scalar}, the sum over levels; maps are (N, C, H, W) per level."""
        pairs = self.pairs(student, teacher).values()
        return {"loss_pkd": torch.stack([pearson_distance(s, t) for s, t in pairs]).sum()}
