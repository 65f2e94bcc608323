"""BiFPN: a feature pyramid that goes down and up again, several times, with trained weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling.backbone import Backbone
from torch import nn

_EPS = 1e-4


class TopLevels(Backbone):
    """A bottom-up network and up to two coarser stages, res6 and res7, by pooling."""

    def __init__(
        self, backbone: Backbone, in_features: Sequence[str], channels: int, levels: int, norm: str
    ):
        """
        Args:
            in_features: of ``backbone``, to be returned; the last one is pooled.
            channels: of the coarser stages.
            levels: how many of them.
        """
        super().__init__()
        self.backbone = backbone
        shapes = {name: backbone.output_shape()[name] for name in in_features}
        self._last = last = in_features[-1]
        self._top = [f"res{6 + index}" for index in range(levels)]
        for index, name in enumerate(self._top):
            source = shapes[last].channels if index == 0 else channels
            self.add_module(name, _Pooled(source, channels, norm))
            stride = shapes[last].stride * 2 ** (index + 1)
            shapes[name] = ShapeSpec(channels=channels, stride=stride)
        self._size_divisibility = shapes[last].stride
        self._out_features = list(shapes)
        self._out_feature_channels = {name: shape.channels for name, shape in shapes.items()}
        self._out_feature_strides = {name: shape.stride for name, shape in shapes.items()}

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """From images (N, 3, H, W) to stages by name, from fine to coarse."""
        found = self.backbone(x)
        stages = {name: found[name] for name in self._out_features if name in found}
        x = found[self._last]
        for name in self._top:
            x = getattr(self, name)(x)
            stages[name] = x
        return stages


class _Pooled(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, norm: str):
        super().__init__()
        self.reduction = None
        if in_channels != out_channels:
            self.reduction = _conv(in_channels, out_channels, 1, norm, bias=norm == "")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _half(x if self.reduction is None else self.reduction(x))


class BiFPN(Backbone):
    """EfficientDet's neck (Tan et al., CVPR 2020, arXiv 1911.09070, section 3).

    Levels are named as FPN's: "p3" has stride 8.
    """

    def __init__(self, bottom_up: TopLevels, out_channels: int, num_repeats: int, norm: str = ""):
        """
        Args:
            bottom_up: its stages, each with twice the stride of the one before, are the levels.
            out_channels: of all levels.
            num_repeats: how often it goes down and up.

        Raises:
            ValueError: less than two stages, or others.
        """
        super().__init__()
        shapes = list(bottom_up.output_shape().values())
        strides = [shape.stride for shape in shapes]
        if len(strides) < 2 or any(b != 2 * a for a, b in zip(strides, strides[1:])):
            raise ValueError(
                f"MODEL.BiFPN.IN_FEATURES and FCOS.TOP_LEVELS give levels of strides {strides}; "
                "expected at least two, each of twice the stride of the one before"
            )
        self.bottom_up = bottom_up
        channels = [shape.channels for shape in shapes]
        self.repeated_bifpn = nn.ModuleList()
        for _ in range(num_repeats):
            self.repeated_bifpn.append(_Round(channels, out_channels, norm))
            channels = [out_channels] * len(strides)
        self._out_feature_strides = {f"p{int(math.log2(s))}": s for s in strides}
        self._out_features = list(self._out_feature_strides)
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)

    @property
    def size_divisibility(self) -> int:
        return self.bottom_up.size_divisibility

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """From images (N, 3, H, W) to levels by name, from fine to coarse."""
        levels = list(self.bottom_up(x).values())
        for layer in self.repeated_bifpn:
            levels = layer(levels)
        return dict(zip(self._out_features, levels))


class _Round(nn.Module):
    """Once down and up. Nodes are counted: the inputs first, then those of ``_plan``."""

    def __init__(self, channels: Sequence[int], out_channels: int, norm: str):
        super().__init__()
        self.plan = _plan(len(channels))
        for level, nodes in self.plan:
            name = f"f{level}_{'_'.join(map(str, nodes))}"
            self.register_parameter(f"weights_{name}", nn.Parameter(torch.ones(len(nodes))))
            output = _conv(out_channels, out_channels, 3, norm, bias=norm == "")
            self.add_module(f"outputs_{name}", output)
        for level, count in enumerate(channels):
            if count != out_channels:
                self.add_module(f"lateral_{level}_f{level}", _conv(count, out_channels, 1, norm))

    def forward(self, levels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        maps = list(levels)
        for level in range(len(levels)):
            lateral = getattr(self, f"lateral_{level}_f{level}", None)
            maps[level] = maps[level] if lateral is None else lateral(maps[level])
        outputs: dict[int, torch.Tensor] = {}
        for level, nodes in self.plan:
            name = f"f{level}_{'_'.join(map(str, nodes))}"
            weights = F.relu(getattr(self, f"weights_{name}"))
            weights = weights / (weights.sum() + _EPS)
            size = levels[level].shape[-2:]
            mixed = sum(w * _resized(maps[node], size) for w, node in zip(weights, nodes))
            outputs[level] = getattr(self, f"outputs_{name}")(F.silu(mixed))
            maps.append(outputs[level])
        return [outputs[level] for level in range(len(levels))]


def _plan(count: int) -> list[tuple[int, tuple[int, ...]]]:
    """The level of each node, and the nodes that it reads."""
    nodes: list[tuple[int, tuple[int, ...]]] = []
    newest = list(range(count))
    for level in reversed(range(count - 1)):
        nodes.append((level, (level, newest[level + 1])))
        newest[level] = count + len(nodes) - 1
    for level in range(1, count):
        own = (level,) if newest[level] == level else (level, newest[level])
        nodes.append((level, (*own, newest[level - 1])))
        newest[level] = count + len(nodes) - 1
    return nodes


def _resized(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    if x.shape[-2:] == torch.Size(size):
        return x
    return _half(x) if x.shape[-1] > size[-1] or x.shape[-2] > size[-2] else F.interpolate(x, size=size)


def _half(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


def _conv(in_channels: int, out_channels: int, size: int, norm: str, bias: bool = True) -> Conv2d:
    conv = Conv2d(
        in_channels,
        out_channels,
        size,
        padding=size // 2,
        bias=bias,
        norm=get_norm(norm, out_channels),
    )
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if bias:
        nn.init.zeros_(conv.bias)
    return conv
