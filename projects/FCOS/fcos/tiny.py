"""A small FCOS, for tests."""

from __future__ import annotations

from detectron2.config import CfgNode

from distill_d2.testing import CLASSES, Family, dense_config


def config(width: int) -> CfgNode:
    """Levels p2 to p4.

    Args:
        width: channels of the stem.
    """
    cfg = dense_config(width, "OneStageDetector")
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "FCOS"
    node = cfg.MODEL.FCOS
    node.IN_FEATURES, node.FPN_STRIDES = ["p2", "p3", "p4"], [4, 8, 16]
    node.SIZES_OF_INTEREST, node.NUM_CLASSES = [16, 32], CLASSES
    node.NUM_CLS_CONVS = node.NUM_BOX_CONVS = 1
    node.LOSS_NORMALIZER_CLS = "moving_fg"  # a moving average, which a resumed run must have
    return cfg


FAMILY = Family(config)
