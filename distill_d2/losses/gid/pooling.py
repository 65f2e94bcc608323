"""ROIAlign on the levels of a neck, without waiting for the device.

detectron2's ROIPooler sorts boxes by level, so the host waits for their numbers. Here the positions
of all levels are rows of one table, and every bin of every box is a weighted sum of some of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.structures import Boxes

# A box of 224 pixels is pooled from the level with stride 16 (FPN, arXiv 1612.03144, eq. 1).
_CANONICAL_SIZE, _CANONICAL_LEVEL = 224, 4


def pool(
    levels: Sequence[torch.Tensor],
    strides: Sequence[int],
    boxes: torch.Tensor,
    resolution: int,
    sampling_ratio: int,
) -> torch.Tensor:
    """What detectron2's ROIPooler with "ROIAlignV2" gives.

    Args:
        levels: (N, C, H, W) each, from fine to coarse.
        strides: of the levels in pixels, each twice the one before.
        boxes: (N, K, 4), absolute XYXY pixels, inside the padded image.
        resolution: side of the result; sampling_ratio: samples per side of each of its bins.

    Returns:
        (N, K, C, resolution, resolution); differentiable w.r.t. the levels, not the boxes.
    """
    images, slots = boxes.shape[:2]
    flat = boxes.flatten(0, 1)
    assigned = level_of(flat, strides)
    table = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
    first, height, width = _of_level(levels, assigned)
    boxes_on_level = flat / _pick(strides, assigned, flat.dtype)[:, None] - 0.5
    left, top, right, bottom = boxes_on_level.unbind(-1)
    rows, row_weights = _samples(top, bottom, height, resolution, sampling_ratio)
    columns, column_weights = _samples(left, right, width, resolution, sampling_ratio)
    image = torch.arange(images, device=flat.device).repeat_interleave(slots, output_size=len(flat))
    start = image * table.shape[1] + first
    index = rows[:, :, None, :, None] * width.view(-1, 1, 1, 1, 1) + columns[:, None, :, None]
    weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None]
    bins = F.embedding_bag(
        (index + start.view(-1, 1, 1, 1, 1)).flatten(3).flatten(0, 2),
        table.flatten(0, 1),
        mode="sum",
        per_sample_weights=weights.flatten(3).flatten(0, 2),
    )
    return bins.view(images, slots, resolution, resolution, -1).movedim(-1, 2)


def level_of(boxes: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """(M,) int64: the index of the level from which each of M boxes (M, 4) is pooled."""
    first = int(math.log2(strides[0]))
    last = first + len(strides) - 1
    return assign_boxes_to_levels([Boxes(boxes)], first, last, _CANONICAL_SIZE, _CANONICAL_LEVEL)


def _of_level(levels: Sequence[torch.Tensor], assigned: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of each box's level: its first row in the table, height and width; (M,) int64 each."""
    sizes = [level.shape[-2:] for level in levels]
    firsts = [sum(h * w for h, w in sizes[:index]) for index in range(len(sizes))]
    heights, widths = zip(*sizes)
    return tuple(_pick(values, assigned, torch.int64) for values in (firsts, heights, widths))


def _pick(values: Sequence[int], index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``values[index]``; plain numbers, so that no list has to be brought to the device."""
    picked = torch.zeros_like(index, dtype=dtype)
    for position, value in enumerate(values):
        picked = picked.masked_fill(index == position, value)
    return picked


def _samples(
    start: torch.Tensor, end: torch.Tensor, size: torch.Tensor, resolution: int, ratio: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Along one axis, the positions that each bin of each of M boxes reads, and their weights.

    Args:
        start, end: (M,) of the boxes, in positions of their levels; size: (M,) of the levels.

    Returns:
        (M, resolution, 2 ratio) int64 positions and float weights, which add up to 1.
    """
    side = ((end - start) / resolution)[:, None, None]
    bins = torch.arange(resolution, device=start.device).view(-1, 1)
    inside = torch.arange(ratio, device=start.device) + 0.5
    at = start[:, None, None] + bins * side + inside * side / ratio
    last = (size - 1).view(-1, 1, 1)
    at = at.clamp(min=0).minimum(last)
    low = at.floor()
    upper = at - low
    positions = torch.stack([low.long(), (low.long() + 1).minimum(last)], dim=-1)
    weights = torch.stack([1 - upper, upper], dim=-1) / ratio
    return positions.flatten(2), weights.flatten(2)
