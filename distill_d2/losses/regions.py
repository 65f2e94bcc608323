"""How far a student's feature map is from the teacher's, in objects and in the background."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

FORMS = ("L2", "L1", "smoothL1")


class _SquaredDistance(torch.autograd.Function):
    """sum_c (s - t)^2; keeps s and t for the gradient, which exist anyway, instead of s - t."""

    @staticmethod
    def forward(ctx, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(student, teacher)
        return (student - teacher).square_().sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: torch.Tensor):
        student, teacher = ctx.saved_tensors
        return (student - teacher).mul_(2 * grad_output[:, None]), None


def distance_map(
    student: torch.Tensor, teacher: torch.Tensor, form: str = "L2", *, inverted: bool = False
) -> torch.Tensor:
    """The distance in each cell, summed over channels: (s - t)^2, |s - t|, or its smooth form (beta 1).

    Args:
        student, teacher: (N, C, H, W) float32.
        form: one of FORMS.
        inverted: "smoothL1" as in DeFeat's code: |d| where |d| < 1, and d^2 elsewhere.

    Returns:
        (N, H, W), differentiable in ``student``.
    """
    if form == "L2":
        return _SquaredDistance.apply(student, teacher)
    if form == "smoothL1" and not inverted:
        return F.smooth_l1_loss(student, teacher, reduction="none").sum(dim=1)
    distance = F.l1_loss(student, teacher, reduction="none")
    if form == "smoothL1":
        distance = torch.where(distance < 1, distance, distance.square())
    return distance.sum(dim=1)


class _WeightedDistances(torch.autograd.Function):
    """Keeps s, t and the weights for the gradient."""

    @staticmethod
    def forward(ctx, student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor):
        ctx.save_for_backward(student, teacher, weights)
        difference = student - teacher
        sums = difference.sum(dim=(2, 3))
        squares = difference.square_()
        total = squares.sum()
        return squares.mul_(weights[..., None, None]).sum(dim=1), total, sums

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_cells: torch.Tensor, grad_total: torch.Tensor, grad_sums: torch.Tensor):
        student, teacher, weights = ctx.saved_tensors
        factor = torch.addcmul(2 * grad_total, weights[..., None, None], 2 * grad_cells[:, None])
        return (student - teacher).mul_(factor).add_(grad_sums[..., None, None]), None, None


def weighted_distances(
    student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums of d = s - t of two maps (N, C, H, W), in one pass; differentiable in ``student``.

    Args:
        weights: of each image and channel, (N, C).

    Returns:
        in each cell the sum over channels of weights d^2, (N, H, W); the sum of all d^2, a scalar; the sum
        over cells of d, (N, C).
    """
    return _WeightedDistances.apply(student, teacher, weights)


def region_means(
    distances: torch.Tensor, mask: torch.Tensor, channels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half the mean distance of all elements in the mask, and of all outside it (DeFeat).

    sum(M d) / max(1, 2 C sum(M)), of all cells of the process's batch; 0 where a region is empty.

    Args:
        distances, mask: (N, H, W), of a level with C ``channels``.

    Returns:
        two scalars.
    """
    inside, outside = (
        (distances * region).sum() / (2 * channels * region.sum()).clamp(min=1)
        for region in (mask, 1 - mask)
    )
    return inside, outside
