"""MobileNetV2 with SSDLite's extra layers."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from torch import nn
from torchvision.models import mobilenet_v2
from torchvision.models.mobilenetv2 import InvertedResidual

from distill_d2.plugins import register_if_free

# Blocks that reduce the resolution; the levels of stride 8 and 16 are their expansions.
_TO_16, _TO_32 = 7, 14
# Of the extra blocks: output channels and hidden ones, relative to the input's.
_EXTRAS = ((512, 0.2), (256, 0.25), (256, 0.5), (64, 0.25))


class SSDMobileNetV2(Backbone):
    """MobileNetV2 (Sandler et al., CVPR 2018, section 6.2) and four more inverted residuals of stride 2.

    Levels s16 (the expansion of the block that reduces to stride 32, before its depthwise
    convolution), s32, s64, s100, s150 and s300, 19 to 1 cells wide for images of 300, and s8 (likewise) for
    losses on features. Named by their strides.
    """

    def __init__(self, width: float = 1.0, last: int = 300):
        """
        Args:
            width: times the channels of the paper, rounded to multiples of 8.
            last: stride of the last level; there are no layers beyond it.
        """
        super().__init__()
        self.features = mobilenet_v2(weights=None, width_mult=width).features
        channels = self.features[-1].out_channels
        shapes = {"s8": self._expanded(_TO_16), "s16": self._expanded(_TO_32), "s32": channels}
        self.extras = nn.ModuleList()
        for name, (out, ratio) in zip(("s64", "s100", "s150", "s300"), _EXTRAS):
            if int(name[1:]) > last:
                break
            self.extras.append(InvertedResidual(channels, out, stride=2, expand_ratio=ratio))
            shapes[name] = channels = out
        self._out_feature_channels = shapes
        self._out_feature_strides = {name: int(name[1:]) for name in shapes}
        self._out_features = list(shapes)

    def _expanded(self, block: int) -> int:
        return self.features[block].conv[0][0].out_channels

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """From images (N, 3, H, W) to levels by name, from fine to coarse."""
        maps = []
        for index, block in enumerate(self.features):
            if index not in (_TO_16, _TO_32):
                x = block(x)
                continue
            expanded = block.conv[0](x)  # a block of stride 2 has no residual connection
            maps.append(expanded)
            x = block.conv[1:](expanded)
        maps.append(x)
        for block in self.extras:
            x = block(x)
            maps.append(x)
        return dict(zip(self._out_features, maps))


@register_if_free(BACKBONE_REGISTRY)
def build_ssd_mobilenet_v2_backbone(cfg: CfgNode, _input_shape: ShapeSpec) -> SSDMobileNetV2:
    """Build it from MODEL.SSD.WIDTH and STRIDES."""
    return SSDMobileNetV2(cfg.MODEL.SSD.WIDTH, max(cfg.MODEL.SSD.STRIDES))
