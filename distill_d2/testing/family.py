"""A small detector of every kind, and batches for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Callable

import torch
from detectron2.config import CfgNode
from detectron2.modeling import FCOS, build_model
from detectron2.structures import BitMasks
from torch import nn

from distill_d2.plugins import detectors

from .tiny import tiny_batch, tiny_config, tiny_detector


@dataclass(frozen=True, eq=False)
class Family:
    """A kind of detector.

    Attributes:
        config: from the width of the stem to a config of a detector for images of about 64 pixels;
            None where the detector has no yacs config.
        detector: from the width of the stem to a detector; None: it is built from ``config``.
        batch: ``tiny_batch``, or a function with the same arguments ``count``, ``size`` and ``objects``
            that adds what this kind of detector is trained on.
        stages: names of the backbone's stages.
        levels: the levels on which it predicts boxes, where these are not all of its neck.
        pooled: the levels at which features are pooled, where these are not all.
    """

    config: Callable[[int], CfgNode] | None = None
    detector: Callable[[int], nn.Module] | None = None
    batch: Callable[..., list[dict]] = tiny_batch
    stages: Sequence[str] = ("res2", "res3", "res4")
    levels: Sequence[str] = ()
    pooled: Sequence[str] = ()

    def build(self, width: int) -> nn.Module:
        """A detector whose stem has ``width`` channels. Unlike those of a new detector, its predictions
        differ from place to place, and its boxes have an area."""
        if self.detector is not None:
            return _varied(self.detector(width))
        assert self.config is not None, "a family has a config or a detector"
        cfg = self.config(width)
        return _varied(build_model(cfg))


def families() -> dict[str, Family]:
    """Those of all known detectors, by the detectors' names; the detectors' modules are imported."""
    return {name: each.load_family() for name, each in detectors().items() if each.family}


def dense_config(width: int, architecture: str) -> CfgNode:
    """Of a one-stage detector on levels p2 to p4, with as many channels as GN needs."""
    cfg = tiny_config("retinanet", width, channels=32)
    cfg.MODEL.META_ARCHITECTURE = architecture
    return cfg


def fcos_detector(width: int) -> nn.Module:
    """detectron2's FCOS, whose losses do not take half precision."""
    model = tiny_detector("fcos", width)
    model.__class__ = _FloatFCOS
    return model


class _FloatFCOS(FCOS):
    def losses(self, anchors, pred_logits, gt_labels, pred_anchor_deltas, gt_boxes, pred_centerness):
        predictions = [
            [level.float() for level in each]
            for each in (pred_logits, pred_anchor_deltas, pred_centerness)
        ]
        logits, deltas, centerness = predictions
        with torch.autocast(logits[0].device.type, enabled=False):
            return super().losses(anchors, logits, gt_labels, deltas, gt_boxes, centerness)


def polygons(count: int = 2, size: int = 64, objects: int = 2) -> list[dict]:
    """``tiny_batch`` with polygon masks."""
    return tiny_batch(count, size, objects, masks=True)


def bitmasks(count: int = 2, size: int = 64, objects: int = 2) -> list[dict]:
    """``tiny_batch`` with bit masks."""
    batch = polygons(count, size, objects)
    for item in batch:
        instances = item["instances"]
        instances.gt_masks = BitMasks.from_polygon_masks(instances.gt_masks, *instances.image_size)
    return batch


def _tiny(family: str) -> Callable[[int], CfgNode]:
    return lambda width: tiny_config(family, width)


def _varied(model: nn.Module) -> nn.Module:
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and name.rpartition(".")[2] in _OUTPUTS:
            nn.init.normal_(module.weight, std=0.1)
            if module.bias is not None:
                nn.init.constant_(module.bias, 1.0)
    return model


_OUTPUTS = ("cls_score", "cls_logits", "bbox_pred", "ctrness", "filter", "cate_pred", "kernel_pred")
_RCNN = ("res2", "res3", "res4", "res5")

RETINANET = Family(_tiny("retinanet"))
FASTER_RCNN = Family(_tiny("faster"), stages=_RCNN)
MASK_RCNN = Family(_tiny("mask"), batch=polygons, stages=_RCNN)
FCOS_OF_DETECTRON2 = Family(detector=fcos_detector)
