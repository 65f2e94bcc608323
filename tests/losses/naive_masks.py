"""The masks of objects box by box and cell by cell, in plain floats; nothing of the package.

A box is [x1, y1, x2, y2]; images are lists of N images' boxes; masks are float64 (N, H, W).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Callable

import torch

Box = Sequence[float]
Size = tuple[int, int]
Marks = dict[tuple[int, int], float]  # by (row, column)


def numbers(images: Sequence[torch.Tensor]) -> list[list[Box]]:
    return [boxes.tolist() for boxes in images]


def level_of(box: Box, levels: int, finest_scale: float = 56.0) -> int:
    x1, y1, x2, y2 = box
    scale = math.sqrt((x2 - x1 + 1) * (y2 - y1 + 1))
    level = math.floor(math.log2(scale / finest_scale + 1e-6))
    return min(max(level, 0), levels - 1)


def cells_of(box: Box, size: Size, stride: int) -> list[tuple[int, int]]:
    """(row, column) of the cells that a box covers."""
    height, width = size
    x1, y1, x2, y2 = (int(side / stride) for side in box)
    left, top, right, bottom = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
    if left == right or top == bottom:
        return [(min(top, height - 1), min(left, width - 1))]
    return [(row, column) for row in range(top, bottom) for column in range(left, right)]


def box_marks(box: Box, size: Size, stride: int) -> Marks:
    return dict.fromkeys(cells_of(box, size, stride), 1.0)


def gaussian_marks(box: Box, size: Size, stride: int) -> Marks:
    x1, y1, x2, y2 = box
    marks = {}
    for row, column in cells_of(box, size, stride):
        value = 1.0
        for low, high, cell in ((x1, x2, column), (y1, y2, row)):
            deviation = max((high - low) / 2, stride / 2)
            distance = (cell + 0.5) * stride - (low + high) / 2
            value *= math.exp(-(distance**2) / (2 * deviation**2))
        marks[row, column] = value
    return marks


def iou(a: Box, b: Box) -> float:
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0.0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (areas - width * height)


def anchor_marks(box: Box, anchors: torch.Tensor, threshold: float) -> Marks:
    """Of anchors (H, W, A, 4)."""
    best = {}
    for row, of_row in enumerate(anchors.tolist()):
        for column, of_cell in enumerate(of_row):
            best[row, column] = max(iou(box, anchor) for anchor in of_cell)
    largest = max(best.values())
    return {cell: 1.0 for cell, value in best.items() if value > threshold * largest}


def draw(images: Sequence[Sequence[Box]], size: Size, marks: Callable[[Box], Marks]) -> torch.Tensor:
    """The largest mark of any of an image's boxes in each cell."""
    mask = torch.zeros(len(images), *size, dtype=torch.float64)
    for image, boxes in enumerate(images):
        for box in boxes:
            for (row, column), value in marks(box).items():
                mask[image, row, column] = max(float(mask[image, row, column]), value)
    return mask


def object_masks(
    kind: str,
    images: Sequence[Sequence[Box]],
    sizes: dict[str, Size],
    strides: dict[str, int],
    anchors: dict[str, torch.Tensor],
    *,
    level_assign: str = "single",
    finest_scale: float = 56.0,
    threshold: float = 0.5,
) -> dict[str, torch.Tensor]:
    """By level name, masks of kind "gt", "roi", "gaussian" or "one"."""
    masks = {}
    for index, name in enumerate(sorted(sizes, key=lambda name: strides[name])):
        size, stride = sizes[name], strides[name]
        mine = [
            [
                box
                for box in boxes
                if level_assign == "all" or level_of(box, len(sizes), finest_scale) == index
            ]
            for boxes in images
        ]
        if kind == "one":
            masks[name] = torch.ones(len(images), *size, dtype=torch.float64)
        elif kind == "roi":
            masks[name] = draw(mine, size, lambda box: anchor_marks(box, anchors[name], threshold))  # noqa: B023
        elif kind == "gaussian":
            masks[name] = draw(mine, size, lambda box: gaussian_marks(box, size, stride))  # noqa: B023
        else:
            masks[name] = draw(mine, size, lambda box: box_marks(box, size, stride))  # noqa: B023
    return masks


def stage_mask(images: Sequence[Sequence[Box]], padded: Size) -> torch.Tensor:
    """All boxes on one grid of stride 4."""
    size = math.ceil(padded[0] / 4), math.ceil(padded[1] / 4)
    return draw(images, size, lambda box: box_marks(box, size, 4))


def picked(mask: torch.Tensor, size: Size) -> torch.Tensor:
    """Of a mask (N, H, W) the nearest cells, on a map of another size."""
    (_, height, width), (rows, columns) = mask.shape, size
    found = torch.zeros(len(mask), rows, columns, dtype=mask.dtype)
    for row in range(rows):
        for column in range(columns):
            found[:, row, column] = mask[:, row * height // rows, column * width // columns]
    return found


def square_anchors(
    sizes: dict[str, Size], strides: dict[str, int], ratios: Sequence[float] = (0.5, 1.0, 2.0)
) -> dict[str, torch.Tensor]:
    """(H, W, A, 4) by level: anchors of 8 strides and these ratios, around cells' first corners."""
    anchors = {}
    for name, (height, width) in sizes.items():
        stride, grid = strides[name], []
        shapes = [(8 * stride / math.sqrt(ratio), 8 * stride * math.sqrt(ratio)) for ratio in ratios]
        for row in range(height):
            for column in range(width):
                x, y = column * stride, row * stride
                grid += [[x - w / 2, y - h / 2, x + w / 2, y + h / 2] for w, h in shapes]
        anchors[name] = torch.tensor(grid).view(height, width, len(ratios), 4)
    return anchors
