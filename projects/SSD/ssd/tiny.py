"""A small SSD, for tests."""

from __future__ import annotations

from detectron2.config import CfgNode, get_cfg

from distill_d2.config import add_distill_config, load_yaml
from distill_d2.model_zoo import get_config_file
from distill_d2.testing import CLASSES, Family, tiny_batch

_STAGES = ("s16", "s32")


def config(width: int) -> CfgNode:
    """For images of 96x96 pixels only: 300x300 would take ten times as long.

    Args:
        width: channels of a stem that has 64 in the paper.
    """
    cfg = get_cfg()
    add_distill_config(cfg)
    load_yaml(cfg, get_config_file("Base-SSD.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    # torchvision's MobileNetV2 has 1280 channels in the end, whatever its width.
    cfg.MODEL.BACKBONE.NAME = "build_ssd_vgg16_backbone"
    cfg.INPUT.FIXED_SIZE = [96, 96]
    node = cfg.MODEL.SSD
    node.WIDTH, node.NUM_CLASSES, node.SIZE, node.STRIDES = width / 64, CLASSES, 96, [16, 32]
    node.MIN_SIZES, node.MAX_SIZES, node.ASPECT_RATIOS = [20.0, 40.0], [40.0, 60.0], [[2.0]] * 2
    return cfg


def squares(count: int = 2, size: int = 64, objects: int = 2) -> list[dict]:
    """Images of one size, 96x96 pixels, for every ``size``: SSD takes no others."""
    return tiny_batch(count, 64, objects, shapes=[(96, 96)])


FAMILY = Family(config, batch=squares, stages=_STAGES, levels=_STAGES, pooled=("s16",))
