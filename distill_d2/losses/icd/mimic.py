"""Attention-weighted value mimicking (ICD, NeurIPS 2021).

Student and teacher project their features to values, V_S and V_T; per head of d channels both are
normalized (layer norm without affine, LN). With M the attention of an image's instances, summed:

    mse   mean over images, heads and channels of  sum_s M |LN V_S - LN V_T|^2 / sum_s M
    l1, smoothL1   sum over images, heads and positions of  M mean_j |...|  /  sum of M
    L2    the root of the same with squares
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ..kept_graph import is_graph_kept
from .projection import Offsets, positions_of, project_levels, split_levels

LOSS_FORMS = ("mse", "MSE", "l1", "smoothL1", "L2", "l2")
NORMS = ("ln", "tln", "none")

_EPS = 1e-5  # of the layer norms
_MIN_MASS = 1e-6
# Positions, of all images, that are worked on at once. On a CPU their values stay in its cache, on a
# GPU they bound the memory of a step.
_CPU_CHUNK = 2048
_GPU_CHUNK = 32768


def value_distance(
    maps: list[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor,
    offsets: Offsets,
    teacher: torch.Tensor,
    mass: torch.Tensor,
    *,
    form: str = "mse",
    norm: str = "ln",
) -> torch.Tensor:
    """The distance of a student's projected values from a teacher's; a scalar.

    Differentiable with respect to maps, weight, bias and offsets.

    Args:
        maps: the student's levels, (N, C, H, W) each.
        weight, bias, offsets: of its value projection (D, C), (D,), see project_levels.
        teacher: (N, S, D) its values.
        mass: (N, h, S), M.
        form: one of LOSS_FORMS; norm: "ln" both, "tln" the teacher's only, "none".
    """
    teacher = teacher.detach()
    if form.lower() == "mse" and norm == "ln" and offsets is None:
        batch, heads, _ = mass.shape
        share = mass / (mass.sum(-1, keepdim=True).clamp_(min=_MIN_MASS) * batch * heads)
        weight, bias = _centered(weight, heads), _centered(bias, heads)
        return _NormalizedDistance.apply(weight, bias, teacher, share, *maps)
    return _plain_distance(project_levels(maps, weight, bias, offsets), teacher, mass, form, norm)


def _plain_distance(student, teacher, mass, form, norm) -> torch.Tensor:
    heads = mass.shape[1]
    student, teacher = (values.unflatten(-1, (heads, -1)) for values in (student, teacher))
    if norm != "none":
        teacher = layer_norm(teacher)
    if norm == "ln":
        student = layer_norm(student)
    error = _ERRORS[form.lower()](student, teacher).mean(-1).transpose(1, 2)  # (N, h, S)
    if form.lower() == "mse":
        per_head = (error * mass).sum(-1) / mass.sum(-1).clamp(min=_MIN_MASS)
        return per_head.mean()
    pooled = (error * mass).sum() / mass.sum().clamp(min=_MIN_MASS)
    if form.lower() == "l2":
        # The root of 0 has no slope, of a batch without instances for example.
        return torch.where(pooled > 0, pooled, 1.0).sqrt() * (pooled > 0)
    return pooled


_ERRORS = {
    "mse": lambda s, t: (s - t) ** 2,
    "l2": lambda s, t: (s - t) ** 2,
    "l1": lambda s, t: (s - t).abs(),
    "smoothl1": lambda s, t: F.smooth_l1_loss(s, t, reduction="none"),
}


def layer_norm(values: torch.Tensor) -> torch.Tensor:
    """Normalize the last dimension; no affine."""
    return F.layer_norm(values, values.shape[-1:], eps=_EPS)


def _centered(parameter: torch.Tensor, heads: int) -> torch.Tensor:
    """The projection (D, ...) whose values have mean 0 in every head: half of their layer norm."""
    per_head = parameter.unflatten(0, (heads, -1))
    return (per_head - per_head.mean(1, keepdim=True)).flatten(0, 1)


class _NormalizedDistance(torch.autograd.Function):
    """sum over n, s, h of share * |LN(x) - LN(t)|^2 / d, with x = W f + b centered in every head.

    With t centered as well, A = mean x^2, B = mean t^2, X = mean x t over the d channels of a head,
    r = (A + eps)^-1/2 and q = (B + eps)^-1/2:
        |LN x - LN t|^2 / d = A r^2 + B q^2 - 2 X r q,
        d/dx_j = (2/d) [(eps r^4 + X q r^3) x_j - r q t_j].
    The gradients are computed in the same pass over the positions, chunk by chunk, so that neither
    the values of the student nor their gradients are ever there as a whole.
    """

    @staticmethod
    def forward(ctx, weight, bias, teacher, share, *maps):
        heads, batch = share.shape[1], len(teacher)
        chunk = max((_GPU_CHUNK if teacher.is_cuda else _CPU_CHUNK) // batch, 1)
        share = share.transpose(1, 2)
        down = weight.t().expand(batch, -1, -1)
        loss = teacher.new_zeros(())
        grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        grad_maps: list[torch.Tensor | None] = [
            torch.empty_like(feature, memory_format=torch.contiguous_format) if needed else None
            for feature, needed in zip(maps, ctx.needs_input_grad[4:])
        ]
        sizes = [feature.shape[-2:] for feature in maps]
        levels = zip(maps, grad_maps, split_levels(teacher, sizes), split_levels(share, sizes))
        for feature, grad_map, targets, shares in levels:
            positions = positions_of(feature)
            for start in range(0, positions.shape[1], chunk):
                here = slice(start, start + chunk)
                x = torch.baddbmm(bias, positions[:, here], down)
                part, slope = _distance_and_slope(x, targets[:, here], shares[:, here], heads)
                loss += part
                grad_weight += torch.bmm(slope.transpose(1, 2), positions[:, here]).sum(0)
                grad_bias += slope.sum((0, 1))
                if grad_map is not None:
                    torch.bmm(down, slope.transpose(1, 2), out=grad_map.flatten(2)[..., here])
        ctx.gradients = (grad_weight, grad_bias, grad_maps)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.gradients is None:
            raise RuntimeError("ICD's value loss can be differentiated once; compute it again")
        grad_weight, grad_bias, grad_maps = ctx.gradients
        if is_graph_kept():
            of_maps = [None if gradient is None else gradient * grad for gradient in grad_maps]
            return (grad_weight * grad, grad_bias * grad, None, None, *of_maps)
        ctx.gradients = None  # scaled in place below, so not usable again
        for gradient in (grad_weight, grad_bias, *grad_maps):
            if gradient is not None:
                gradient.mul_(grad)
        return (grad_weight, grad_bias, None, None, *grad_maps)


def _distance_and_slope(x, target, share, heads):
    """The sum of a chunk, and its derivative by x in the memory of x; x and target (N, s, D)."""
    size = x.shape[-1] // heads
    x_heads, t_heads = x.unflatten(-1, (heads, size)), target.unflatten(-1, (heads, size))
    t_heads = t_heads - t_heads.mean(-1, keepdim=True)
    a, b = _mean_square(x_heads), _mean_square(t_heads)
    cross = torch.linalg.vecdot(x_heads, t_heads) / size
    r, q = (a + _EPS).rsqrt(), (b + _EPS).rsqrt()
    distance = a * r**2 + b * q**2 - 2 * cross * r * q
    scale = share * (2 / size)
    of_x = scale * (_EPS * r**4 + cross * q * r**3)
    x_heads.mul_(of_x[..., None]).addcmul_(t_heads, (scale * r * q)[..., None], value=-1)
    return (share * distance).sum(), x


def _mean_square(values: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(values, dim=-1).square_() / values.shape[-1]
