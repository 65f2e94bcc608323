"""Any ResNet backbone of detectron2, with or without a pyramid, whose first stage is a bottleneck."""

from __future__ import annotations

from typing import Any, Callable

from detectron2.config import CfgNode as CN
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone, ResNet

from distill_d2.plugins import register_if_free

from .stage import BottleneckStage

_NAME = "build_bottleneck_backbone"


@register_if_free(BACKBONE_REGISTRY)
def build_bottleneck_backbone(cfg: CN, input_shape: ShapeSpec) -> Backbone:
    """Build MODEL.BOTTLENECK.BACKBONE and replace its first stage.

    MODEL.BACKBONE.FREEZE_AT 1 or more freezes the stem; the bottleneck is trained in any case.

    Raises:
        ValueError: BACKBONE is not registered, or another key does not fit.
        TypeError: it does not build a ResNet.
    """
    node = cfg.MODEL.BOTTLENECK
    return inject_bottleneck(
        _builder(node.BACKBONE)(cfg, input_shape),
        node.CHANNELS,
        encoder_widths=node.ENCODER_WIDTHS,
        decoder_widths=node.DECODER_WIDTHS,
        quant_bits=node.QUANT_BITS,
        reference_bugs=node.REFERENCE_BUGS,
    )


def _builder(name: str) -> Callable[[CN, ShapeSpec], Backbone]:
    try:
        if name != _NAME:
            return BACKBONE_REGISTRY.get(name)
    except KeyError:
        pass
    raise ValueError(
        f"MODEL.BOTTLENECK.BACKBONE is '{name}'; expected a registered backbone such as "
        "build_resnet_fpn_backbone"
    )


def inject_bottleneck(backbone: Backbone, channels: int = 3, **options: Any) -> Backbone:
    """Replace the first stage of a ResNet, in place.

    In a LazyConfig: ``model.backbone = L(inject_bottleneck)(backbone=model.backbone, channels=3)``.

    Args:
        backbone: a detectron2 ResNet, or a pyramid on one.
        channels, options: of BottleneckStage.

    Returns:
        ``backbone``.

    Raises:
        TypeError: there is no ResNet in it.
        ValueError: the ResNet has no first stage, or one that changes the resolution.
    """
    resnet = getattr(backbone, "bottom_up", backbone)
    if not isinstance(resnet, ResNet):
        raise TypeError(
            f"MODEL.BOTTLENECK.BACKBONE builds a {type(resnet).__name__}; a bottleneck replaces the "
            "first stage of a detectron2 ResNet"
        )
    shape, strides = resnet._out_feature_channels, resnet._out_feature_strides
    name = next(iter(resnet.stage_names), "")
    if strides.get(name) != strides["stem"]:
        raise ValueError(
            "a bottleneck replaces a first stage of the stem's resolution, but the ResNet's strides are "
            f"{strides} (MODEL.RESNETS.OUT_FEATURES, of a LazyConfig the stages)"
        )
    stage = BottleneckStage(shape["stem"], shape[name], channels, **options)
    setattr(resnet, name, stage)
    resnet.stages[0] = stage  # a plain list, which ResNet.forward goes through
    return backbone
