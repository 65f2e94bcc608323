"""CondInst detectors of milliseconds."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from fcos_case import fcos_config, spread
from torch import nn


def condinst_config(channels: int = 32, width: int = 8, **keys: Any) -> CfgNode:
    """As fcos_config; the mask branch has stride 4. Keys of MODEL.CONDINST, with __ for a dot, and, in
    capitals that it does not have, of MODEL.FCOS."""
    cfg = fcos_config(channels, width)
    cfg.MODEL.META_ARCHITECTURE = "CondInst"
    cfg.MODEL.MASK_ON = True
    node = cfg.MODEL.CONDINST
    node.MASK_OUT_STRIDE = 2
    node.MASK_BRANCH.IN_FEATURES = ["p2", "p3", "p4"]
    node.MASK_BRANCH.CHANNELS = 8
    node.MASK_BRANCH.NUM_CONVS = 1
    for key, value in keys.items():
        key = key.replace("__", ".")
        root = "FCOS" if key in cfg.MODEL.FCOS else "CONDINST"
        cfg.merge_from_list([f"MODEL.{root}.{key}", value])
    return cfg


def condinst(channels: int = 32, width: int = 8, **keys: Any) -> nn.Module:
    """A detector whose predictions differ from location to location."""
    model = build_model(condinst_config(channels, width, **keys))
    spread(model)
    nn.init.normal_(model.controller.weight, std=0.1)
    return model
