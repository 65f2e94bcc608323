"""Small FCOS detectors, and what tests ask of them."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from distill_d2.projects.fcos.tiny import config
from torch import nn

#: Of the levels p2 to p4.
STRIDES = (4, 8, 16)


def fcos(width: int = 8, **keys: Any) -> nn.Module:
    """A detector of three levels whose predictions differ from location to location.

    Args:
        width: channels of the stem.
        keys: of MODEL.FCOS.
    """
    cfg = config(width)
    for key, value in keys.items():
        assert key in cfg.MODEL.FCOS, key
        cfg.MODEL.FCOS[key] = value
    model = build_model(cfg)
    spread(model)
    return model


def spread(model: nn.Module) -> None:
    """Give the head predictions that differ from location to location."""
    head = model.proposal_generator.fcos_head
    for layer in (head.cls_logits, head.bbox_pred, head.ctrness):
        nn.init.normal_(layer.weight, std=0.1)
    nn.init.constant_(head.bbox_pred.bias, 1.0)
    nn.init.constant_(head.cls_logits.bias, -2.0)


def without_objects(batch: list[dict]) -> list[dict]:
    """The same images without annotated objects."""
    return [{**item, "instances": item["instances"][:0]} for item in batch]


def objects(boxes: list[list[float]], classes: list[int], size=(64, 64)) -> Instances:
    return Instances(
        size,
        gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        gt_classes=torch.tensor(classes, dtype=torch.int64),
    )


def anchors(model: nn.Module, height: int, width: int) -> list[Boxes]:
    """The squares of each level for images of this size."""
    levels = [torch.empty(1, 1, -(-height // stride), -(-width // stride)) for stride in STRIDES]
    return model.proposal_generator.anchor_generator(levels)
