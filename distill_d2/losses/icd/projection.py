"""One linear map of all positions of all levels, without concatenating the levels first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch.autograd.function import once_differentiable

Offsets = Optional[tuple[torch.Tensor, torch.Tensor]]


def positions_of(feature: torch.Tensor) -> torch.Tensor:
    """A map (N, C, H, W) as (N, H * W, C), without a copy."""
    return feature.flatten(2).transpose(1, 2)


class _ProjectLevels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, bias, rows, columns, *maps):
        sizes = [feature.shape[-2:] for feature in maps]
        total = sum(height * width for height, width in sizes)
        output = maps[0].new_empty(len(maps[0]), total, len(weight))
        parts = split_levels(output, sizes)
        offsets = [None] * len(maps) if rows is None else _per_level(rows, columns, sizes)
        for feature, part, offset, size in zip(maps, parts, offsets, sizes):
            if offset is None:
                part.copy_(bias.expand_as(part))
            else:
                grid = part.unflatten(1, size)
                torch.add(offset[0][:, :, None], offset[1][:, None], out=grid)
            part.baddbmm_(positions_of(feature), weight.t().expand(len(part), -1, -1))
        ctx.save_for_backward(weight, *maps)
        ctx.has_offsets = rows is not None
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, *maps = ctx.saved_tensors
        sizes = [feature.shape[-2:] for feature in maps]
        parts = split_levels(grad, sizes)
        grad_weight = torch.zeros_like(weight)
        grad_maps = [None] * len(maps)
        for index, (feature, part) in enumerate(zip(maps, parts)):
            grad_weight += torch.bmm(part.transpose(1, 2), positions_of(feature)).sum(0)
            if ctx.needs_input_grad[4 + index]:
                columns = weight.t().expand(len(part), -1, -1)
                grad_maps[index] = torch.bmm(columns, part.transpose(1, 2)).view_as(feature)
        if not ctx.has_offsets:
            return (grad_weight, grad.sum((0, 1)), None, None, *grad_maps)
        grids = [part.unflatten(1, size) for part, size in zip(parts, sizes)]
        grad_rows = torch.cat([grid.sum(2) for grid in grids], dim=1)
        grad_columns = torch.cat([grid.sum(1) for grid in grids], dim=1)
        return (grad_weight, None, grad_rows, grad_columns, *grad_maps)


def project_levels(
    maps: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor,
    offsets: Offsets = None,
) -> torch.Tensor:
    """``weight`` x + offset at every position x of every level.

    Args:
        maps: L levels (N, C, H, W), in any memory layout.
        weight: (D, C).
        bias: (D,), the offset of all positions; ignored where ``offsets`` are given.
        offsets: (N, sum(H), D) of each row and (N, sum(W), D) of each column of each level, added.

    Returns:
        (N, S, D), S = sum(H * W), level by level, row by row.
    """
    rows, columns = (None, None) if offsets is None else offsets
    return _ProjectLevels.apply(weight, bias, rows, columns, *maps)


def split_levels(values: torch.Tensor, sizes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Views (N, H * W, D) per level of values (N, S, D)."""
    return list(values.split([height * width for height, width in sizes], dim=1))


def _per_level(rows, columns, sizes):
    heights, widths = zip(*sizes)
    return list(zip(rows.split(heights, dim=1), columns.split(widths, dim=1)))
