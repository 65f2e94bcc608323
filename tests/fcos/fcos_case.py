"""FCOS detectors of milliseconds, and what tests ask of them."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import nn

from distill_d2.testing.tiny import tiny_config

CLASSES = 3


def fcos_config(channels: int = 32, width: int = 8, **keys: Any) -> CfgNode:
    """Of three levels, p2 to p4, on a SmallResNet; keys of MODEL.FCOS."""
    cfg = tiny_config("retinanet", width, channels)
    cfg.MODEL.META_ARCHITECTURE = "OneStageDetector"
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "FCOS"
    node = cfg.MODEL.FCOS
    node.IN_FEATURES = ["p2", "p3", "p4"]
    node.FPN_STRIDES = [4, 8, 16]
    node.SIZES_OF_INTEREST = [16, 32]
    node.NUM_CLASSES = CLASSES
    node.NUM_CLS_CONVS = node.NUM_BOX_CONVS = 1
    for key, value in keys.items():
        assert key in node, key
        node[key] = value
    return cfg


def fcos(channels: int = 32, width: int = 8, **keys: Any) -> nn.Module:
    """A detector whose predictions differ from location to location."""
    model = build_model(fcos_config(channels, width, **keys))
    spread(model)
    return model


def spread(model: nn.Module) -> None:
    head = model.proposal_generator.fcos_head
    for layer in (head.cls_logits, head.bbox_pred, head.ctrness):
        nn.init.normal_(layer.weight, std=0.1)
    nn.init.constant_(head.bbox_pred.bias, 1.0)
    nn.init.constant_(head.cls_logits.bias, -2.0)


def objects(boxes: list[list[float]], classes: list[int], size=(64, 64)) -> Instances:
    return Instances(
        size,
        gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        gt_classes=torch.tensor(classes, dtype=torch.int64),
    )


def maps(model: nn.Module, height: int = 64, width: int = 64, count: int = 1) -> list[torch.Tensor]:
    """Empty levels of an image: all that locations depend on."""
    return [
        torch.zeros(count, 1, -(-height // stride[0]), -(-width // stride[1]))
        for stride in model.proposal_generator.anchor_generator.strides
        for stride in [(stride, stride)]
    ]


def without_objects(batch):
    """The same images, with nothing on them."""
    return [{**item, "instances": item["instances"][:0]} for item in batch]
