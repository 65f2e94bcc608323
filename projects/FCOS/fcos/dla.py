"""DLA-34: a bottom-up network whose stages are trees of residual blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import get_norm
from detectron2.modeling.backbone import Backbone
from fvcore.nn.weight_init import c2_msra_fill
from torch import nn


class DLA34(Backbone):
    """Deep Layer Aggregation (Yu et al., CVPR 2018, arXiv 1707.06484, section 3 and table 1).

    Stages "stage2" to "stage5", of strides 4 to 32 and 64 to 512 channels. Modules are named as in the
    authors' checkpoints.
    """

    def __init__(self, out_features: Sequence[str], norm: str = "BN"):
        """
        Args:
            out_features: names of the stages to return.
            norm: as of detectron2's ``get_norm``.

        Raises:
            ValueError: an unknown stage.
        """
        super().__init__()
        channels = {"stage2": 64, "stage3": 128, "stage4": 256, "stage5": 512}
        unknown = [name for name in out_features if name not in channels]
        if unknown or not out_features:
            raise ValueError(
                f"MODEL.DLA.OUT_FEATURES is {list(out_features)}; expected some of {list(channels)}"
            )
        self.base_layer = _conv(3, 16, 7, 1, norm)
        self.level0 = _conv(16, 16, 3, 1, norm)
        self.level1 = _conv(16, 32, 3, 2, norm)
        self.level2 = Tree(1, 32, 64, 2, norm)
        self.level3 = Tree(2, 64, 128, 2, norm, root_reads_input=True)
        self.level4 = Tree(2, 128, 256, 2, norm, root_reads_input=True)
        self.level5 = Tree(1, 256, 512, 2, norm, root_reads_input=True)
        self._out_features = list(out_features)
        self._out_feature_channels = {name: channels[name] for name in out_features}
        self._out_feature_strides = {name: 2 ** int(name[-1]) for name in out_features}

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """From images (N, 3, H, W), H and W divisible by 32, to stages by name, from fine to coarse."""
        x = self.level1(self.level0(self.base_layer(x)))
        stages = {}
        for index in range(2, 6):
            x = getattr(self, f"level{index}")(x)
            stages[f"stage{index}"] = x
        return {name: stages[name] for name in self._out_features}


class Tree(nn.Module):
    """Hierarchical aggregation of 2^depth residual blocks: each node's root sees the outputs of both its
    subtrees, and those of earlier nodes of the tree that it belongs to."""

    def __init__(
        self,
        depth: int,
        in_channels: int,
        out_channels: int,
        stride: int,
        norm: str,
        others: int = 0,
        root_reads_input: bool = False,
    ):
        """
        Args:
            stride: of the first block.
            others: channels of the earlier nodes.
            root_reads_input: the tree's input, pooled, is one of them.
        """
        super().__init__()
        self.root_reads_input = root_reads_input
        self.downsample = nn.MaxPool2d(stride) if stride > 1 else nn.Identity()
        others += in_channels if root_reads_input else 0
        if depth > 1:
            self.tree1 = Tree(depth - 1, in_channels, out_channels, stride, norm)
            self.tree2 = Tree(depth - 1, out_channels, out_channels, 1, norm, others + out_channels)
            self.root = None
        else:
            self.tree1 = _Block(in_channels, out_channels, stride, norm)
            self.tree2 = _Block(out_channels, out_channels, 1, norm)
            self.root = _Root(2 * out_channels + others, out_channels, norm)
        self.project = None
        if in_channels != out_channels:
            self.project = _conv(in_channels, out_channels, 1, 1, norm)[:2]  # without ReLU
            if self.root is None:
                # The checkpoints have it although only a tree of two blocks projects its input. Not
                # trained, so that every trained parameter gets a gradient.
                self.project.requires_grad_(False)

    def forward(self, x: torch.Tensor, earlier: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H / stride, W / stride).

        Args:
            earlier: outputs of earlier nodes.
        """
        pooled = self.downsample(x)
        if self.root_reads_input:
            earlier = [*earlier, pooled]
        if self.root is None:
            first = self.tree1(x)
            return self.tree2(first, [*earlier, first])
        first = self.tree1(x, pooled if self.project is None else self.project(pooled))
        second = self.tree2(first, first)
        return self.root(second, first, *earlier)


class _Block(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: str):
        super().__init__()
        self.conv1, self.bn1, _ = _conv(in_channels, out_channels, 3, stride, norm)
        self.conv2, self.bn2, _ = _conv(out_channels, out_channels, 3, 1, norm)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + residual)


class _Root(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, norm: str):
        super().__init__()
        self.conv, self.bn, _ = _conv(in_channels, out_channels, 1, 1, norm)

    def forward(self, *nodes: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(torch.cat(nodes, dim=1))))


def _conv(in_channels: int, out_channels: int, size: int, stride: int, norm: str) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)
    c2_msra_fill(conv)
    return nn.Sequential(conv, get_norm(norm, out_channels), nn.ReLU())
