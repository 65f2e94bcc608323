"""CondInst detectors of milliseconds."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from distill_d2.projects.condinst import tiny
from fcos_case import spread
from torch import nn


def condinst_config(width: int = 8, **keys: Any) -> CfgNode:
    """Masks of stride 2; the mask branch has stride 4. Keys of MODEL.FCOS, or else of MODEL.CONDINST, with
    __ for a dot."""
    cfg = tiny.config(width)
    cfg.MODEL.CONDINST.MASK_OUT_STRIDE = 2
    for key, value in keys.items():
        key = key.replace("__", ".")
        root = "FCOS" if key in cfg.MODEL.FCOS else "CONDINST"
        cfg.merge_from_list([f"MODEL.{root}.{key}", value])
    return cfg


def condinst(width: int = 8, **keys: Any) -> nn.Module:
    """A detector whose predictions differ from location to location."""
    model = build_model(condinst_config(width, **keys))
    spread(model)
    nn.init.normal_(model.controller.weight, std=0.1)
    return model
