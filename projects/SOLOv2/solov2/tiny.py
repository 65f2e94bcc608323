"""A small SOLOv2, for tests."""

from __future__ import annotations

from detectron2.config import CfgNode

from distill_d2.testing import CLASSES, Family, bitmasks, tiny_config


def config(width: int) -> CfgNode:
    """Levels p2 to p6.

    Args:
        width: channels of the stem.
    """
    cfg = tiny_config("mask", width, channels=32)
    cfg.MODEL.META_ARCHITECTURE = "SOLOv2"
    cfg.INPUT.MASK_FORMAT = "bitmask"
    node = cfg.MODEL.SOLOV2
    node.NUM_CLASSES, node.NUM_GRIDS = CLASSES, [10, 8, 6, 4, 3]
    node.FPN_SCALE_RANGES = [[1, 24], [12, 48], [24, 96], [48, 192], [96, 512]]
    node.FPN_INSTANCE_STRIDES = [4, 8, 16, 32, 32]
    node.INSTANCE_IN_CHANNELS = node.MASK_IN_CHANNELS = 32
    node.INSTANCE_CHANNELS = node.MASK_CHANNELS = node.NUM_KERNELS = node.NUM_MASKS = 32
    node.NUM_INSTANCE_CONVS = 1
    return cfg


FAMILY = Family(config, batch=bitmasks, stages=("res2", "res3", "res4", "res5"))
