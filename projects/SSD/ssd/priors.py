"""SSD's prior boxes (default boxes; Liu et al., ECCV 2016, section 2.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from detectron2.structures import Boxes
from torch import nn


class SSDPriors(nn.Module):
    """The anchors of an SSD, in the order of its head's outputs, as detectron2's anchor generators give them.

    On cell (row i, column j) of a level with stride s, centered at ((j + 0.5) s, (i + 0.5) s): squares of
    side min and sqrt(min max), then per aspect ratio r boxes of (min sqrt(r), min / sqrt(r)) and
    (min / sqrt(r), min sqrt(r)); centers and sides are clamped to the image.
    """

    def __init__(
        self,
        size: int,
        strides: Sequence[int],
        min_sizes: Sequence[float],
        max_sizes: Sequence[float],
        aspect_ratios: Sequence[Sequence[float]],
    ):
        """
        Args:
            size: of the images in pixels, high and wide.
            strides, min_sizes, max_sizes, aspect_ratios: one per level; sizes in pixels.

        Raises:
            ValueError: the lists have different lengths.
        """
        super().__init__()
        counts = [len(strides), len(min_sizes), len(max_sizes), len(aspect_ratios)]
        if len(set(counts)) > 1:
            raise ValueError(
                "MODEL.SSD: STRIDES, MIN_SIZES, MAX_SIZES and ASPECT_RATIOS have one entry per level; got "
                f"{counts} entries"
            )
        self.size = size
        self.strides = list(strides)
        self.sides = [_sides(*level) for level in zip(min_sizes, max_sizes, aspect_ratios)]
        self.register_buffer("_anywhere", torch.empty(0), persistent=False)  # tells the device
        self._cache: dict[tuple, list[torch.Tensor]] = {}

    @property
    def num_priors(self) -> list[int]:
        """Prior boxes per cell of each level."""
        return [len(level) for level in self.sides]

    def forward(self, features: Sequence[torch.Tensor]) -> list[Boxes]:
        """The prior boxes (H W A, 4) of each level (N, C, H, W), absolute XYXY."""
        return [Boxes(level * self.size) for level in self._of(features)]

    def relative(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """The prior boxes (R, 4) of all levels, XYXY relative to the image's size: those that are
        matched, since of boxes that overlap an object equally the rounding decides."""
        return torch.cat(self._of(features))

    def _of(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        device = self._anywhere.device
        key = (device, *(feature.shape[-2:] for feature in features))
        if key not in self._cache:
            levels = zip(key[1:], self.strides, self.sides)
            self._cache = {key: [_level(*level, self.size).to(device) for level in levels]}
        return self._cache[key]


def _sides(low: float, high: float, ratios: Sequence[float]) -> list[tuple[float, float]]:
    """Width and height in pixels of each prior box of a cell."""
    sides = [(low, low), (math.sqrt(low * high),) * 2]
    for ratio in ratios:
        longer, shorter = low * math.sqrt(ratio), low / math.sqrt(ratio)
        sides += [(longer, shorter), (shorter, longer)]
    return sides


def _level(
    shape: tuple[int, int], stride: int, sides: Sequence[tuple[float, float]], size: int
) -> torch.Tensor:
    y, x = ((torch.arange(length, dtype=torch.float64) + 0.5) * stride for length in shape)
    boxes = torch.empty(*shape, len(sides), 4, dtype=torch.float64)
    boxes[..., 0] = x[None, :, None]
    boxes[..., 1] = y[:, None, None]
    boxes[..., 2:] = torch.tensor(sides, dtype=torch.float64)
    centers, whole = (boxes / size).float().clamp_(0, 1).view(-1, 4).split(2, dim=1)
    return torch.cat([centers - whole / 2, centers + whole / 2], dim=1)
