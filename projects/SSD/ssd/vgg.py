"""VGG16 with SSD's extra layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from torch import nn
from torchvision.models.vgg import cfgs, make_layers

from distill_d2.plugins import register_if_free

_CEIL_POOL, _RELU4_3, _LAST_POOL = 16, 22, 30


class L2Norm(nn.Module):
    """Each position's channels scaled to length 1, times a trainable scale per channel (Liu et al., SSD,
    ECCV 2016, section 3.1, after ParseNet)."""

    def __init__(self, channels: int, scale: float = 20.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, channels, H, W) to the same."""
        # Not a square root of squares, which has no gradient where all channels are 0; in half precision
        # such a position's length would be 0.
        length = torch.linalg.vector_norm(x.float(), dim=1, keepdim=True) + 1e-10
        return self.weight.view(-1, 1, 1) * (x / length)


class SSDVGG16(Backbone):
    """VGG16 to conv5_3, fc6 and fc7 as convolutions, and four or five pairs of extra convolutions.

    With ``conv4_3`` the original SSD300: levels s8 (conv4_3, normalized), s16 (fc7), s32, s64, s100 and
    s300, 38 to 1 cells wide. Without, the teacher of MobileNetV2-SSDLite: s16 to s300 over s150, 19 to 1
    cells, and s8 (conv4_3 as it is) for losses on features. Named by their strides for images of 300.
    """

    def __init__(self, conv4_3: bool = False, width: float = 1.0, last: int = 300):
        """
        Args:
            conv4_3: the original SSD300.
            width: times the channels of the paper.
            last: stride of the last level; there are no layers beyond it.
        """
        super().__init__()
        plan = [layer if layer == "M" else _times(layer, width) for layer in cfgs["D"]]
        self.features = _trunk(plan, _times(1024, width))
        self.l2_norm = L2Norm(plan[-2]) if conv4_3 else None
        names = ["s8", "s16", "s32", "s64", "s100"] + (["s300"] if conv4_3 else ["s150", "s300"])
        names = [name for name in names if int(name[1:]) <= last]
        strides = ([2, 2, 1, 1] if conv4_3 else [2, 2, 2, 2, 2])[: len(names) - 2]
        outs = [512, 256, 256, 256, 256][: len(strides)]
        self.extras = nn.ModuleList(extra_layers(_times(1024, width), outs, strides, width))
        channels = [plan[-2], *(_times(c, width) for c in (1024, *outs))]
        self._out_features = names
        self._out_feature_channels = dict(zip(names, channels))
        self._out_feature_strides = {name: int(name[1:]) for name in names}
        initialize(self)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """From images (N, 3, H, W) to levels by name, from fine to coarse."""
        x = self.features[: _RELU4_3 + 1](x)
        maps = [x if self.l2_norm is None else self.l2_norm(x)]
        x = self.features[_RELU4_3 + 1 :](x)
        maps.append(x)
        for index, layer in enumerate(self.extras):
            x = F.relu_(layer(x))
            if index % 2:
                maps.append(x)
        return dict(zip(self._out_features, maps))


def _times(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def _trunk(plan: Sequence[str | int], channels: int) -> nn.Sequential:
    """torchvision's convolutions of VGG16; the last pooling keeps the resolution, and fc6 and fc7 follow."""
    layers = make_layers(list(plan))
    layers[_CEIL_POOL].ceil_mode = True  # 75 to 38 cells
    layers[_LAST_POOL] = nn.MaxPool2d(kernel_size=3, stride=1, padding=1)
    last = plan[-2]
    return layers.extend(
        [
            nn.Conv2d(last, channels, kernel_size=3, padding=6, dilation=6),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, kernel_size=1),
            nn.ReLU(inplace=True),
        ]
    )


def extra_layers(
    channels: int, outs: Sequence[int], strides: Sequence[int], width: float = 1.0
) -> list[nn.Module]:
    """Pairs of a 1x1 convolution that halves the channels and a 3x3 one; of stride 1 without padding."""
    layers = []
    for out, stride in zip(outs, strides):
        out = _times(out, width)
        middle = max(1, out // 2)
        layers.append(nn.Conv2d(channels, middle, kernel_size=1))
        layers.append(
            nn.Conv2d(middle, out, kernel_size=3, stride=stride, padding=1 if stride == 2 else 0)
        )
        channels = out
    return layers


def initialize(module: nn.Module) -> None:
    """He's weights for convolutions with ReLUs, and biases of 0, in place."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)


@register_if_free(BACKBONE_REGISTRY)
def build_ssd_vgg16_backbone(cfg: CfgNode, _input_shape: ShapeSpec) -> SSDVGG16:
    """Build it from MODEL.SSD.CONV4_3, WIDTH and STRIDES."""
    node = cfg.MODEL.SSD
    return SSDVGG16(node.CONV4_3, node.WIDTH, max(node.STRIDES))
