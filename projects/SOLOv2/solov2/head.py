"""SOLOv2's two heads (Wang et al., NeurIPS 2020, arXiv 2003.10152, section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from distill_d2.tracing import is_recorded

Size = tuple[int, int]

NORMS = ("GN", "none")
GROUPS = 32


class SOLOv2InstanceHead(nn.Module):
    """A class score and a kernel for each cell of a grid on each level (section 3.2.1 and figure 2).

    The levels share the head. The kernels' tower also sees the position (CoordConv).
    """

    def __init__(
        self,
        *,
        in_channels: int,
        channels: int,
        num_convs: int,
        num_classes: int,
        num_kernels: int,
        num_grids: Sequence[int],
        in_strides: Sequence[int],
        strides: Sequence[int],
        coordinates: bool = True,
        norm: str = "GN",
        prior_prob: float = 0.01,
    ):
        """
        Args:
            in_channels: of the levels; channels, num_convs: of the towers.
            num_kernels: weights of a predicted kernel.
            num_grids: cells per side of each level's grid.
            in_strides: of the levels, in pixels, fine to coarse; strides: to which they are resized.
            coordinates: whether the kernels' tower sees the position.
            norm: of NORMS.
            prior_prob: scores at the start.
        """
        super().__init__()
        self.num_grids = list(num_grids)
        self.in_strides = list(in_strides)
        self.strides = list(strides)
        self.coordinates = coordinates
        self.cate_tower = _tower(in_channels, channels, num_convs, norm)
        self.kernel_tower = _tower(in_channels + 2 * coordinates, channels, num_convs, norm)
        self.cate_pred = nn.Conv2d(channels, num_classes, kernel_size=3, padding=1)
        self.kernel_pred = nn.Conv2d(channels, num_kernels, kernel_size=3, padding=1)
        _initialize(self)
        nn.init.constant_(self.cate_pred.bias, -math.log((1 - prior_prob) / prior_prob))

    def forward(self, features: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """From levels (N, C, H, W) to class logits (N, K, S, S) and kernels (N, D, S, S) per level."""
        logits, kernels = [], []
        for feature, grid in zip(self._resized(features), self.num_grids):
            cells = resize(feature, (grid, grid))
            logits.append(self.cate_pred(self.cate_tower(cells)))
            if self.coordinates:
                position = resize(coordinates_of(feature), (grid, grid))
                cells = torch.cat([cells, position.expand(len(cells), -1, -1, -1)], dim=1)
            kernels.append(self.kernel_pred(self.kernel_tower(cells)))
        return logits, kernels

    def _resized(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        # Of the padded image, by the finest level: a pooled level may be half a cell larger than it.
        height, width = (side * self.in_strides[0] for side in features[0].shape[-2:])
        sizes = [(-(-height // stride), -(-width // stride)) for stride in self.strides]
        return [resize(feature, size) for feature, size in zip(features, sizes)]


class SOLOv2MaskHead(nn.Module):
    """The features that kernels make masks of: all levels, brought to the finest one's size and added
    (section 3.2.2 and figure 3)."""

    def __init__(
        self,
        *,
        in_channels: int,
        channels: int,
        num_masks: int,
        num_levels: int,
        coordinates: bool = True,
        norm: str = "GN",
    ):
        """
        Args:
            in_channels: of the levels; channels: of the convolutions; num_masks: of the output.
            coordinates: whether the convolutions of the coarsest level see the position.
            norm: of NORMS; the last convolution always has a group norm.
        """
        super().__init__()
        self.coordinates = coordinates
        last = num_levels - 1
        self.convs_all_levels = nn.ModuleList(
            _upsampling(in_channels + 2 * (coordinates and level == last), channels, level, norm)
            for level in range(num_levels)
        )
        self.conv_pred = nn.Sequential(*_block(channels, num_masks, "GN", kernel_size=1))
        _initialize(self)

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """From levels (N, C, H / 2^i, W / 2^i) to (N, D, H, W)."""
        *finer, coarsest = features
        if self.coordinates:
            position = coordinates_of(coarsest).expand(len(coarsest), -1, -1, -1)
            coarsest = torch.cat([coarsest, position], dim=1)
        levels = [convs(x) for convs, x in zip(self.convs_all_levels, [*finer, coarsest])]
        return self.conv_pred(sum(levels[1:], levels[0]))


def coordinates_of(feature: torch.Tensor) -> torch.Tensor:
    """The position of each cell of a map (N, C, H, W): (1, 2, H, W), x and y from -1 to 1, the first and
    the last cell included."""
    like = {"device": feature.device, "dtype": feature.dtype}
    y, x = (_from_minus_1_to_1(side, like) for side in feature.shape[-2:])
    return torch.stack(torch.meshgrid(x, y, indexing="xy"))[None]


def _from_minus_1_to_1(count: int, like: dict[str, Any]) -> torch.Tensor:
    if is_recorded():  # the length of linspace would be recorded
        return torch.arange(count, **like) * 2 / (count - 1) - 1
    return torch.linspace(-1, 1, count, **like)


def resize(maps: torch.Tensor, size: Size) -> torch.Tensor:
    """Maps (N, C, H, W) in another size, bilinear."""
    if not is_recorded() and tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def _tower(in_channels: int, channels: int, num_convs: int, norm: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(num_convs):
        layers += _block(channels if index else in_channels, channels, norm)
    return nn.Sequential(*layers)


def _upsampling(in_channels: int, channels: int, level: int, norm: str) -> nn.Sequential:
    """A convolution, for a level that is not the finest ``level`` of them, each followed by twice the
    size."""
    stages = nn.Sequential()
    for index in range(max(level, 1)):
        stages.add_module(
            f"conv{index}", nn.Sequential(*_block(channels if index else in_channels, channels, norm))
        )
        if level:
            twice = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
            stages.add_module(f"upsample{index}", twice)
    return stages


def _block(in_channels: int, channels: int, norm: str, kernel_size: int = 3) -> list[nn.Module]:
    convolution = nn.Conv2d(
        in_channels, channels, kernel_size, padding=kernel_size // 2, bias=norm == "none"
    )
    norms = [] if norm == "none" else [nn.GroupNorm(GROUPS, channels)]
    return [convolution, *norms, nn.ReLU(inplace=True)]


def _initialize(head: nn.Module) -> None:
    for layer in head.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.01)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
