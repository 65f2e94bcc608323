"""A small instance for tests."""

from __future__ import annotations

from detectron2.config import CfgNode

from distill_d2.testing import Family, tiny_config


def config(width: int) -> CfgNode:
    """A RetinaNet on levels p2 to p4, on timm's smallest models: a student, and from ``width`` 16 on a teacher of
    another kind."""
    cfg = tiny_config("retinanet", width)
    cfg.MODEL.BACKBONE.NAME = "build_timm_fpn_backbone"
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4"]
    cfg.MODEL.TIMM.NAME = "test_resnet" if width >= 16 else "test_efficientnet"
    return cfg


def vit_config(width: int) -> CfgNode:
    """A RetinaNet on levels p2 to p4 of a simple pyramid, on timm's smallest ViTs."""
    cfg = config(width)
    cfg.MODEL.FPN.NORM = "LN"
    cfg.MODEL.TIMM.NAME = "test_vit"
    # Two blocks are enough.
    cfg.MODEL.TIMM.ARGS = CfgNode({"depth": 2, "embed_dim": 4 * width, "num_heads": 2})
    return cfg


FAMILY = Family(config)
VIT_FAMILY = Family(vit_config, stages=("res4",))
