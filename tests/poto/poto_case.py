"""Small POTOs, whose predictions differ from location to location."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from distill_d2.projects.poto import POTO, tiny
from torch import nn

VARIANTS = {
    "plain": {"USE_3DMF": False, "USE_AUX": False},
    "3dmf": {"USE_3DMF": True, "USE_AUX": False},
    "aux": {"USE_3DMF": False, "USE_AUX": True},
    "both": {"USE_3DMF": True, "USE_AUX": True},
}


def config(variant: str = "plain", width: int = 8, **keys) -> CfgNode:
    """Levels p2 to p4; ``keys`` are of MODEL.POTO."""
    cfg = tiny.config(width)
    for key, value in {**VARIANTS[variant], **keys}.items():
        cfg.MODEL.POTO[key] = value
    return cfg


def poto(variant: str = "plain", width: int = 8, **keys) -> POTO:
    """A new one's predictions hardly differ, so its output layers have larger weights here."""
    model = build_model(config(variant, width, **keys))
    for layer in (model.head.cls_score, model.head.bbox_pred, model.head.filter):
        if layer is not None:
            nn.init.normal_(layer.weight, std=0.1)
    nn.init.constant_(model.head.bbox_pred.bias, 1.0)
    return model


@torch.no_grad()
def computed(model: POTO, inputs: list[dict]):
    """``Rows`` of a batch."""
    features = model.backbone(model.preprocess_image(inputs).tensor)
    levels = [features[name] for name in model.head_in_features]
    return model.rows(levels, model.head(levels))
