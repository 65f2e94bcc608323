"""A small POTO, for tests."""

from __future__ import annotations

from detectron2.config import CfgNode

from distill_d2.testing import CLASSES, Family, dense_config


def config(width: int) -> CfgNode:
    """Levels p2 to p4.

    Args:
        width: channels of the stem.
    """
    cfg = dense_config(width, "POTO")
    node = cfg.MODEL.POTO
    node.IN_FEATURES, node.NUM_CLASSES, node.NUM_CONVS = ["p2", "p3", "p4"], CLASSES, 1
    node.USE_3DMF = node.USE_AUX = True
    return cfg


FAMILY = Family(config)
