"""Small POTOs on a SmallResNet, whose predictions differ from location to location."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from distill_d2.projects.poto import POTO
from torch import nn

from distill_d2.testing.tiny import CLASSES, tiny_config

VARIANTS = {
    "plain": {},
    "3dmf": {"USE_3DMF": True},
    "aux": {"USE_AUX": True},
    "both": {"USE_3DMF": True, "USE_AUX": True},
}


def config(variant: str = "plain", width: int = 8, **keys) -> CfgNode:
    """Levels p2 to p4; ``keys`` are of MODEL.POTO."""
    cfg = tiny_config("retinanet", width, channels=32)
    cfg.MODEL.META_ARCHITECTURE = "POTO"
    own = {"NUM_CLASSES": CLASSES, "IN_FEATURES": ["p2", "p3", "p4"], "NUM_CONVS": 1}
    for key, value in {**own, **VARIANTS[variant], **keys}.items():
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


def objects(boxes: Sequence[Sequence[float]], classes: Sequence[int], size: int = 64) -> Instances:
    return Instances(
        (size, size),
        gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).view(-1, 4)),
        gt_classes=torch.tensor(classes, dtype=torch.int64),
    )


@torch.no_grad()
def computed(model: POTO, inputs: list[dict]):
    """``Rows`` of a batch."""
    features = model.backbone(model.preprocess_image(inputs).tensor)
    levels = [features[name] for name in model.head_in_features]
    return model.rows(levels, model.head(levels))
