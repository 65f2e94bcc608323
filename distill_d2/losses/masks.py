"""Masks of the cells of a feature level that belong to objects.

Boxes are the ground truth of N images, (N, M, 4) absolute XYXY pixels on the padded images, with a mask
(N, M) of those to draw. Masks are (N, H, W) float32, from 0 (background) to 1. All shapes are fixed, so
nothing waits for the device.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ..views import Batch

Size = tuple[int, int]

_BOXES_AT_A_TIME = 16
_STAGE_GRID = 4  # pixels: the stride at which the mask of backbone stages is drawn, and then resized


def level_of_boxes(boxes: torch.Tensor, levels: int, finest_scale: float = 56.0) -> torch.Tensor:
    """The level, from 0 (fine) to levels - 1 (coarse), of each box.

    level = clamp(floor(log2(sqrt(area) / finest_scale)), 0, levels - 1): boxes below 112 pixels are on the
    first level, boxes below 224 on the second. As in DeFeat's code, a side is x2 - x1 + 1.

    Returns:
        (N, M) int64.
    """
    sides = (boxes[..., 2:] - boxes[..., :2] + 1).clamp(min=0)
    scale = sides.prod(dim=-1).sqrt()
    return torch.log2(scale / finest_scale + 1e-6).floor().clamp(0, levels - 1).long()


def cells_of_boxes(boxes: torch.Tensor, size: Size, stride: int) -> tuple[torch.Tensor, ...]:
    """The cells of a level (H, W) that each box covers: first column, first row, and the column and row
    after the last ones.

    Corners are divided by the stride, truncated, and clamped to the level. A box that has no cell of
    width or of height covers the one cell of its first corner; one beside the level covers none.

    Returns:
        four (N, M) float32, whole numbers.
    """
    height, width = size
    x1, y1, x2, y2 = (boxes / stride).trunc().unbind(-1)
    x1, x2 = x1.clamp(min=0), x2.clamp(max=width)
    y1, y2 = y1.clamp(min=0), y2.clamp(max=height)
    thin = (x1 == x2) | (y1 == y2)
    x1 = torch.where(thin, x1.clamp(max=width - 1), x1)
    y1 = torch.where(thin, y1.clamp(max=height - 1), y1)
    return x1, y1, torch.where(thin, x1 + 1, x2), torch.where(thin, y1 + 1, y2)


def box_mask(boxes: torch.Tensor, drawn: torch.Tensor, size: Size, stride: int) -> torch.Tensor:
    """1 in the cells of the drawn boxes, see ``cells_of_boxes`` (DeFeat's mask)."""
    rows, columns = _covered(boxes, size, stride)
    columns = columns & drawn[..., None]
    # How many boxes cover a cell: no tensor of all boxes and all cells is made.
    return (rows.float().transpose(1, 2) @ columns.float()).clamp(max=1)


def gaussian_mask(boxes: torch.Tensor, drawn: torch.Tensor, size: Size, stride: int) -> torch.Tensor:
    """In the cells of the drawn boxes a Gaussian around the box's center, the largest of several.

    Its deviation is half a side of the box, at least half a cell. Follows the adaptive Gaussian mask of
    TADF (arXiv 2006.13108), exp(-dx^2 / 2(w/2)^2 - dy^2 / 2(h/2)^2); not yet checked against the paper.
    """
    rows, columns = _covered(boxes, size, stride)
    x1, y1, x2, y2 = boxes.unbind(-1)
    across = _gaussian(x1, x2, size[1], stride) * (columns & drawn[..., None])
    down = _gaussian(y1, y2, size[0], stride) * rows
    return (down[..., :, None] * across[..., None, :]).amax(dim=1)


def inverse_area_mask(
    boxes: torch.Tensor, drawn: torch.Tensor, size: Size, stride: int, scales: torch.Tensor | None = None
) -> torch.Tensor:
    """In the cells of the drawn boxes 1 / (the box's number of cells), the largest of several: the smallest box
    wins (FGD's mask).

    A box covers the cells from floor(corner / stride) to ceil(corner / stride), both included, with corners
    clamped to 0 from below; all of them count, also those beyond the level. One whose second corner is before
    its first, or before 0, is not drawn.

    Args:
        scales: (N, 2), in place of 1 / stride the columns and rows per pixel, as in FGD's code: there corners
            are not clamped, and a negative one counts from the end, as an index of Python does.
    """
    height, width = size
    x1, y1, x2, y2 = (boxes.clamp(min=0) / stride if scales is None else boxes * _twice(scales)).unbind(
        -1
    )
    x1, y1, x2, y2 = x1.floor(), y1.floor(), x2.ceil(), y2.ceil()
    values = 1 / ((x2 + 1 - x1) * (y2 + 1 - y1))
    if scales is None:
        drawn = drawn & (boxes[..., 2:] >= boxes[..., :2]).all(-1) & (boxes[..., 2:] > 0).all(-1)
    else:
        x1, x2 = (_from_the_end(x, width) for x in (x1, x2 + 1))
        y1, y2 = (_from_the_end(y, height) for y in (y1, y2 + 1))
        x2, y2 = x2 - 1, y2 - 1
    rows, columns = (torch.arange(length, device=boxes.device) for length in size)
    across = (x1[..., None] <= columns) & (columns <= x2[..., None])
    down = (y1[..., None] <= rows) & (rows <= y2[..., None]) & drawn[..., None]
    mask = boxes.new_zeros(len(boxes), height, width)
    # Some boxes at a time: on a fine level a map of all boxes and all cells is large.
    parts = zip(*(part.split(_BOXES_AT_A_TIME, dim=1) for part in (down, across, values)))
    for down, across, values in parts:
        of_boxes = torch.where(across, values[..., None], 0.0)[:, :, None] * down[..., None]
        mask = torch.maximum(mask, of_boxes.amax(dim=1))
    return mask


def anchor_mask(
    boxes: torch.Tensor, drawn: torch.Tensor, anchors: torch.Tensor, threshold: float = 0.5
) -> torch.Tensor:
    """1 in cells with an anchor whose IoU with a drawn box exceeds ``threshold`` times the largest IoU
    of any anchor of the level with that box (FGFI's mask).

    Args:
        anchors: (H, W, A, 4), absolute XYXY; those of a cell have the same shapes everywhere.
    """
    # Lengths that boxes and anchors share along each axis: (N, M, W, A) and (N, M, H, A).
    across = _overlap(boxes[..., 0::2], anchors[0, ..., 0::2])
    down = _overlap(boxes[..., 1::2], anchors[:, 0, :, 1::2])
    sides = anchors[0, 0, :, 2:] - anchors[0, 0, :, :2]
    areas = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)[..., None] + sides.prod(dim=-1)
    largest = _iou(across.amax(dim=2) * down.amax(dim=2), areas).amax(dim=-1)  # (N, M)
    enough = torch.where(drawn, threshold * largest, torch.inf)[..., None, None]
    mask = boxes.new_zeros(len(boxes), *anchors.shape[:2], dtype=torch.bool)
    for anchor in range(anchors.shape[2]):
        common = down[..., anchor, None] * across[..., None, :, anchor]
        iou = _iou(common, areas[..., anchor, None, None])
        mask |= (iou > enough).any(dim=1)
    return mask.float()


def stage_mask(batch: Batch) -> torch.Tensor:
    """The cells of all ground-truth boxes at stride 4, (N, H, W): the mask of backbone stages, which
    have no levels."""
    height, width = (math.ceil(side / _STAGE_GRID) for side in batch.padded_size)
    return box_mask(batch.truth.boxes, batch.truth.valid, (height, width), _STAGE_GRID)


def resized(mask: torch.Tensor, size: Size) -> torch.Tensor:
    """A mask (N, h, w) with the nearest cells of another size (H, W): (N, H, W)."""
    return mask if mask.shape[-2:] == size else F.interpolate(mask[:, None], size)[:, 0]


def _covered(boxes: torch.Tensor, size: Size, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows (N, M, H) and which columns (N, M, W) of a level each box covers."""
    x1, y1, x2, y2 = (cells[..., None] for cells in cells_of_boxes(boxes, size, stride))
    rows, columns = (torch.arange(length, device=boxes.device) for length in size)
    return (y1 <= rows) & (rows < y2), (x1 <= columns) & (columns < x2)


def _gaussian(low: torch.Tensor, high: torch.Tensor, length: int, stride: int) -> torch.Tensor:
    """(N, M, length): along one axis, at the cells' centers, for boxes from ``low`` to ``high``."""
    centers = (torch.arange(length, device=low.device) + 0.5) * stride
    deviation = ((high - low) / 2).clamp(min=stride / 2)[..., None]
    return torch.exp(-(((centers - (low + high)[..., None] / 2) / deviation) ** 2) / 2)


def _twice(scales: torch.Tensor) -> torch.Tensor:
    return torch.cat([scales, scales], dim=-1)[:, None]


def _from_the_end(index: torch.Tensor, length: int) -> torch.Tensor:
    """Where a slice with this index as a bound begins or ends."""
    return torch.where(index < 0, index + length, index).clamp(0, length)


def _overlap(boxes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """(N, M, L, A): the length that intervals (N, M, 2) and (L, A, 2) share."""
    low, high = (part[..., None, None] for part in boxes.unbind(-1))
    return (torch.minimum(high, anchors[..., 1]) - torch.maximum(low, anchors[..., 0])).clamp(min=0)


def _iou(common: torch.Tensor, areas: torch.Tensor) -> torch.Tensor:
    """From the area that two boxes share, and the sum of their areas."""
    return common / (areas - common)
