"""ResNet with the feature pyramid of FCOS: p6 and p7 come from p5."""

from __future__ import annotations

from typing import Optional

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_resnet_backbone
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from torch import nn


@BACKBONE_REGISTRY.register()
def build_fcos_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Levels of MODEL.FPN.IN_FEATURES, and MODEL.FCOS.TOP_LEVELS more."""
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return FPN(
        bottom_up=build_resnet_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block(cfg.MODEL.FCOS.TOP_LEVELS, channels),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def top_block(levels: int, channels: int) -> Optional[nn.Module]:
    """The convolutions that make so many levels (0 or 2) from p5."""
    return LastLevelP6P7(channels, channels, in_feature="p5") if levels else None
