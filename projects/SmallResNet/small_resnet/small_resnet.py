"""A basic-block ResNet of any width with an FPN: small enough to train from scratch on a CPU.

detectron2's own ResNet-18/34 is fixed at width 64 and starts its usual pyramids at stride 8.
"""

from __future__ import annotations

from detectron2.config import CfgNode as CN
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem

from distill_d2.plugins import register_if_free

_STAGES = ("res2", "res3", "res4", "res5")


@register_if_free(BACKBONE_REGISTRY)
def build_small_resnet_backbone(cfg: CN, input_shape: ShapeSpec) -> FPN:
    """Build the network from MODEL.SMALL_RESNET and its pyramid from MODEL.FPN.

    Returns:
        FPN: levels "p2".. of strides 4, 8, ..; each (N, MODEL.FPN.OUT_CHANNELS, H/stride, W/stride).

    Raises:
        ValueError: the keys do not describe four stages, or name a stage that does not exist.
    """
    node = cfg.MODEL.SMALL_RESNET
    _check(node)
    stem = BasicStem(input_shape.channels, node.STEM_WIDTH, norm=node.NORM)
    stages, width = [], node.STEM_WIDTH
    for index, (out_width, blocks) in enumerate(zip(node.WIDTHS, node.BLOCKS)):
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                blocks,
                stride_per_block=[1 if index == 0 else 2] + [1] * (blocks - 1),
                in_channels=width,
                out_channels=out_width,
                norm=node.NORM,
            )
        )
        width = out_width
    resnet = ResNet(stem, stages, out_features=node.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)
    return FPN(
        bottom_up=resnet,
        in_features=node.OUT_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool() if node.TOP_BLOCK else None,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _check(node: CN) -> None:
    if len(node.WIDTHS) != len(_STAGES) or len(node.BLOCKS) != len(_STAGES):
        raise ValueError(
            f"MODEL.SMALL_RESNET needs 4 WIDTHS and 4 BLOCKS, one per stage {list(_STAGES)}; "
            f"got WIDTHS {list(node.WIDTHS)} and BLOCKS {list(node.BLOCKS)}"
        )
    if any(width == following for width, following in zip(node.WIDTHS, node.WIDTHS[1:])):
        raise ValueError(
            f"MODEL.SMALL_RESNET.WIDTHS is {list(node.WIDTHS)}; each stage must be wider or narrower "
            "than the one before it"
        )
    unknown = [name for name in node.OUT_FEATURES if name not in _STAGES]
    if unknown or not node.OUT_FEATURES:
        raise ValueError(
            f"MODEL.SMALL_RESNET.OUT_FEATURES is {list(node.OUT_FEATURES)}; "
            f"the stages are {list(_STAGES)}"
        )
    if node.TOP_BLOCK and "res5" not in node.OUT_FEATURES:
        raise ValueError(
            "MODEL.SMALL_RESNET.TOP_BLOCK pools p5, so OUT_FEATURES must contain res5; "
            f"it is {list(node.OUT_FEATURES)}"
        )
