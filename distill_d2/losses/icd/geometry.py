"""Where the images of a batch are on the levels: padding masks and positional embeddings.

The embedding is DETR's (arXiv 2005.12872): sines and cosines of row and column, counted inside the
image and normalized by its extent. It is a part for the row beside one for the column, kept apart.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...upload import upload

Size = tuple[int, int]

_TEMPERATURE = 10000.0
_EPS = 1e-6


@dataclass(frozen=True)
class Geometry:
    """Of N images on levels with S = sum(H * W) positions in all, level by level, row by row.

    Attributes:
        level_sizes: (H, W) of each level.
        padding: (N, S) bool, True where there is no image; None if it is True nowhere.
        rows: (N, sum(H), C / 2), the embedding of every row of every level.
        columns: (N, sum(W), C / 2), of every column. In padding both repeat the image's last one;
            nothing attends there.
    """

    level_sizes: tuple[Size, ...]
    padding: torch.Tensor | None
    rows: torch.Tensor
    columns: torch.Tensor


@functools.lru_cache(maxsize=4)
def geometry_of(
    level_sizes: tuple[Size, ...],
    padded_size: Size,
    image_sizes: tuple[Size, ...],
    channels: int,
    device: torch.device,
) -> Geometry:
    """The geometry of a batch.

    Args:
        level_sizes: (H, W) of each level.
        padded_size: (height, width) in pixels of the batch.
        image_sizes: N (height, width) in pixels before padding.
        channels: length C of the embedding.
    """
    extents = [_extents(size, padded_size, image_sizes) for size in level_sizes]
    heights, widths = zip(*level_sizes)
    rows, columns = zip(*extents)
    inside = torch.cat([_inside(e, size).flatten(1) for e, size in zip(extents, level_sizes)], dim=1)
    return Geometry(
        level_sizes,
        None if bool(inside.all()) else upload(~inside, device),
        upload(_embed(rows, heights, channels // 2), device),
        upload(_embed(columns, widths, channels // 2), device),
    )


def _extents(level: Size, padded: Size, images: tuple[Size, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """How many rows and columns of a level an image covers, at least in part: two (N, 1)."""
    stride = (padded[0] / level[0] + padded[1] / level[1]) / 2
    covered = torch.ceil(torch.tensor(images, dtype=torch.float64) / stride).long()
    rows, columns = torch.minimum(covered, torch.tensor(level)).split(1, dim=1)
    return rows, columns


def _inside(extents: tuple[torch.Tensor, torch.Tensor], level: Size) -> torch.Tensor:
    rows, columns = (torch.arange(n) < extent for n, extent in zip(level, extents))
    return rows[:, :, None] & columns[:, None, :]


def _embed(extents: Sequence[torch.Tensor], lengths: Sequence[int], dim: int) -> torch.Tensor:
    """(N, sum(lengths), dim) of the coordinates 1 to length on each level, sines between cosines."""
    coordinates = [
        torch.minimum(torch.arange(1, length + 1), extent) / (extent + _EPS)
        for extent, length in zip(extents, lengths)
    ]
    index = torch.arange(dim)
    period = _TEMPERATURE ** (2 * torch.div(index, 2, rounding_mode="floor") / dim)
    angle = torch.cat(coordinates, dim=1)[..., None] * (2 * math.pi) / period
    return torch.where(index % 2 == 0, angle.sin(), angle.cos())
