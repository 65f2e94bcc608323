"""SSD's head: a class and a box convolution per level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.layers import ShapeSpec
from torch import nn


class SSDHead(nn.Module):
    """Class logits and box deltas for the prior boxes of each level, not shared among levels."""

    def __init__(self, shapes: Sequence[ShapeSpec], priors: Sequence[int], num_classes: int, lite: bool):
        """
        Args:
            shapes: of the levels.
            priors: number of prior boxes per cell of each level.
            num_classes: foreground classes; the background is one more, the last.
            lite: a depthwise 3x3 convolution and a 1x1 one instead of a 3x3 one, but on the last level
                a 1x1 one alone (SSDLite).
        """
        super().__init__()
        kinds = [_lite] * (len(shapes) - 1) + [_pointwise] if lite else [_plain] * len(shapes)
        levels = list(zip(kinds, (shape.channels for shape in shapes), priors))
        self.logits = nn.ModuleList(kind(c, count * (num_classes + 1)) for kind, c, count in levels)
        self.deltas = nn.ModuleList(kind(c, count * 4) for kind, c, count in levels)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, features: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """From levels (N, C, H, W) to logits (N, A (K + 1), H, W) and deltas (N, 4 A, H, W) per level."""
        logits = [layer(feature) for layer, feature in zip(self.logits, features)]
        return logits, [layer(feature) for layer, feature in zip(self.deltas, features)]


def _plain(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


def _pointwise(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Conv2d(in_channels, out_channels, kernel_size=1)


def _lite(in_channels: int, out_channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_channels, in_channels, kernel_size=3, padding=1, groups=in_channels),
        nn.BatchNorm2d(in_channels),
        nn.ReLU6(inplace=True),
        nn.Conv2d(in_channels, out_channels, kernel_size=1),
    )
