"""FCOS' backbones: ResNet or DLA-34 with an FPN whose p6 and p7 come from p5, ResNet with BiFPN."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from fvcore.nn.weight_init import c2_xavier_fill
from torch import nn

from distill_d2.plugins import register_if_free

from .bifpn import BiFPN, TopLevels
from .deformable import build_resnet
from .dla import DLA34


@register_if_free(BACKBONE_REGISTRY)
def build_fcos_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Levels of MODEL.FPN.IN_FEATURES, and MODEL.FCOS.TOP_LEVELS more."""
    check_adet_keys(cfg)
    return _fpn(cfg, build_resnet(cfg, input_shape))


@register_if_free(BACKBONE_REGISTRY)
def build_fcos_dla_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """As build_fcos_resnet_fpn_backbone, on MODEL.DLA."""
    check_adet_keys(cfg)
    if cfg.MODEL.DLA.CONV_BODY != "DLA34":
        raise ValueError(f"MODEL.DLA.CONV_BODY is '{cfg.MODEL.DLA.CONV_BODY}'; expected 'DLA34'")
    return _fpn(cfg, DLA34(cfg.MODEL.DLA.OUT_FEATURES, cfg.MODEL.DLA.NORM))


@register_if_free(BACKBONE_REGISTRY)
def build_fcos_resnet_bifpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> BiFPN:
    """Levels of MODEL.BiFPN.IN_FEATURES, and MODEL.FCOS.TOP_LEVELS more."""
    check_adet_keys(cfg)
    node = cfg.MODEL.BiFPN
    bottom_up = TopLevels(
        build_resnet(cfg, input_shape),
        node.IN_FEATURES,
        node.OUT_CHANNELS,
        cfg.MODEL.FCOS.TOP_LEVELS,
        node.NORM,
    )
    return BiFPN(bottom_up, node.OUT_CHANNELS, node.NUM_REPEATS, node.NORM)


def check_adet_keys(cfg: CfgNode) -> None:
    """Refuse values of AdelaiDet's keys that are not offered here.

    Raises:
        ValueError: the message names the key.
    """
    offered = {
        "MOBILENET": (cfg.MODEL.MOBILENET, [False]),
        "BACKBONE.ANTI_ALIAS": (cfg.MODEL.BACKBONE.ANTI_ALIAS, [False]),
        "RESNETS.DEFORM_INTERVAL": (cfg.MODEL.RESNETS.DEFORM_INTERVAL, [1]),
        "FCOS.TOP_LEVELS": (cfg.MODEL.FCOS.TOP_LEVELS, [0, 1, 2]),
    }
    for key, (value, choices) in offered.items():
        if value not in choices:
            listing = " or ".join(map(str, choices))
            raise ValueError(f"MODEL.{key} is {value}; the FCOS backbones here support {listing}")


def top_block(levels: int, channels: int) -> nn.Module | None:
    """The convolutions that make 0, 1 or 2 levels from p5."""
    if levels == 2:
        return LastLevelP6P7(channels, channels, in_feature="p5")
    return LastLevelP6(channels) if levels else None


class LastLevelP6(nn.Module):
    """p6 alone, from p5."""

    num_levels = 1
    in_feature = "p5"

    def __init__(self, channels: int):
        super().__init__()
        self.p6 = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1)
        c2_xavier_fill(self.p6)

    def forward(self, p5: torch.Tensor) -> list[torch.Tensor]:
        return [self.p6(p5)]


def _fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    names, shapes = list(cfg.MODEL.FPN.IN_FEATURES), bottom_up.output_shape()
    missing = [name for name in names if name not in shapes]
    if missing or not names:
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES is {names}, but the bottom-up network returns {list(shapes)} "
            "(MODEL.RESNETS.OUT_FEATURES, MODEL.DLA.OUT_FEATURES)"
        )
    levels, last = cfg.MODEL.FCOS.TOP_LEVELS, shapes[names[-1]].stride
    if levels and last != 32:
        raise ValueError(
            f"MODEL.FCOS.TOP_LEVELS is {levels}: p6 comes from p5, of stride 32, but the last of "
            f"MODEL.FPN.IN_FEATURES, {names[-1]}, has stride {last}"
        )
    return FPN(
        bottom_up=bottom_up,
        in_features=names,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block(levels, cfg.MODEL.FPN.OUT_CHANNELS),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
