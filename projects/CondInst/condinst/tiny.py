"""A small CondInst, for tests."""

from __future__ import annotations

from detectron2.config import CfgNode
from distill_d2.projects.fcos import tiny as fcos

from distill_d2.testing import Family, polygons


def config(width: int) -> CfgNode:
    """Levels p2 to p4.

    Args:
        width: channels of the stem.
    """
    cfg = fcos.config(width)
    cfg.MODEL.META_ARCHITECTURE = "CondInst"
    cfg.MODEL.MASK_ON = True
    branch = cfg.MODEL.CONDINST.MASK_BRANCH
    branch.IN_FEATURES, branch.CHANNELS, branch.NUM_CONVS = ["p2", "p3", "p4"], 8, 1
    return cfg


FAMILY = Family(config, batch=polygons)
