"""A small detector of every kind, and batches for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Callable

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import FCOS, META_ARCH_REGISTRY, build_model
from detectron2.structures import BitMasks
from torch import nn

from distill_d2 import add_distill_config
from distill_d2.config import load_yaml
from distill_d2.model_zoo import get_config_file

from .tiny import CLASSES, tiny_batch, tiny_config, tiny_detector


@dataclass(frozen=True)
class Family:
    """A kind of detector.

    Attributes:
        architecture: name of its meta-architecture; "" where detectron2 registers none.
        config: from the width of the stem to a config of a detector for images of about 64 pixels;
            None where the detector has no yacs config.
        detector: from the width of the stem to a detector; None: it is built from ``config``.
        batch: ``tiny_batch``, or a function with the same arguments ``count``, ``size`` and ``objects``
            that adds what this kind of detector is trained on.
        stages: names of the backbone's stages.
        levels: the levels on which it predicts boxes, where these are not all of its neck.
        pooled: the levels at which features are pooled, where these are not all.
    """

    architecture: str
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
        return _varied(build_model(self.config(width)))


def families(known: dict[str, Family] | None = None) -> dict[str, Family]:
    """Those of FAMILIES, or of others, whose meta-architecture is registered."""
    return {
        name: family
        for name, family in (known or FAMILIES).items()
        if not family.architecture or family.architecture in META_ARCH_REGISTRY
    }


def poto_config(width: int) -> CfgNode:
    cfg = _dense(width, "POTO")
    node = cfg.MODEL.POTO
    node.IN_FEATURES, node.NUM_CLASSES, node.NUM_CONVS = ["p2", "p3", "p4"], CLASSES, 1
    node.USE_3DMF = node.USE_AUX = True
    return cfg


def one_stage_config(width: int) -> CfgNode:
    """AdelaiDet's FCOS."""
    cfg = _dense(width, "OneStageDetector")
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "FCOS"
    node = cfg.MODEL.FCOS
    node.IN_FEATURES, node.FPN_STRIDES = ["p2", "p3", "p4"], [4, 8, 16]
    node.SIZES_OF_INTEREST, node.NUM_CLASSES = [16, 32], CLASSES
    node.NUM_CLS_CONVS = node.NUM_BOX_CONVS = 1
    return cfg


def condinst_config(width: int) -> CfgNode:
    cfg = one_stage_config(width)
    cfg.MODEL.META_ARCHITECTURE = "CondInst"
    cfg.MODEL.MASK_ON = True
    branch = cfg.MODEL.CONDINST.MASK_BRANCH
    branch.IN_FEATURES, branch.CHANNELS, branch.NUM_CONVS = ["p2", "p3", "p4"], 8, 1
    return cfg


def solov2_config(width: int) -> CfgNode:
    """Levels p2 to p6."""
    cfg = tiny_config("mask", width, channels=32)
    cfg.MODEL.META_ARCHITECTURE = "SOLOv2"
    cfg.INPUT.MASK_FORMAT = "bitmask"
    node = cfg.MODEL.SOLOV2
    node.NUM_CLASSES, node.NUM_GRIDS = CLASSES, [10, 8, 6, 4, 3]
    node.FPN_SCALE_RANGES = [[1, 24], [12, 48], [24, 96], [48, 192], [96, 512]]
    node.FPN_INSTANCE_STRIDES = [4, 8, 16, 32, 32]
    node.INSTANCE_IN_CHANNELS = node.MASK_IN_CHANNELS = 32
    node.INSTANCE_CHANNELS = node.MASK_CHANNELS = node.NUM_KERNELS = node.NUM_MASKS = 32
    node.NUM_INSTANCE_CONVS = 1
    return cfg


def ssd_config(width: int) -> CfgNode:
    """For images of 96x96 pixels only: 300x300 would take ten times as long."""
    cfg = get_cfg()
    add_distill_config(cfg)
    load_yaml(cfg, get_config_file("Base-SSD.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.INPUT.FIXED_SIZE = [96, 96]
    node = cfg.MODEL.SSD
    node.WIDTH, node.NUM_CLASSES, node.SIZE, node.STRIDES = width / 64, CLASSES, 96, [16, 32]
    node.MIN_SIZES, node.MAX_SIZES, node.ASPECT_RATIOS = [20.0, 40.0], [40.0, 60.0], [[2.0]] * 2
    return cfg


def _dense(width: int, architecture: str) -> CfgNode:
    """On levels p2 to p4, with as many channels as GN needs."""
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


def squares(count: int = 2, size: int = 64, objects: int = 2) -> list[dict]:
    """Images of one size, 96x96 pixels, whatever ``size`` says: SSD takes no others."""
    return tiny_batch(count, 64, objects, shapes=[(96, 96)])


def _tiny(family: str) -> Callable[[int], CfgNode]:
    return lambda width: tiny_config(family, width)


def _varied(model: nn.Module) -> nn.Module:
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and name.rpartition(".")[2] in _OUTPUTS:
            nn.init.normal_(module.weight, std=0.1)
            nn.init.constant_(module.bias, 1.0)
    return model


_OUTPUTS = ("cls_score", "cls_logits", "bbox_pred", "ctrness", "filter", "cate_pred", "kernel_pred")
_RCNN = ("res2", "res3", "res4", "res5")
_SSD = ("s16", "s32")

FAMILIES = {
    "RetinaNet": Family("RetinaNet", _tiny("retinanet")),
    "Faster R-CNN": Family("GeneralizedRCNN", _tiny("faster"), stages=_RCNN),
    "Mask R-CNN": Family("GeneralizedRCNN", _tiny("mask"), batch=polygons, stages=_RCNN),
    "FCOS (detectron2)": Family("", detector=fcos_detector),
    "SSD": Family("SSD", ssd_config, batch=squares, stages=_SSD, levels=_SSD, pooled=["s16"]),
    "FCOS (AdelaiDet)": Family("OneStageDetector", one_stage_config),
    "CondInst": Family("CondInst", condinst_config, batch=polygons),
    "SOLOv2": Family("SOLOv2", solov2_config, batch=bitmasks, stages=_RCNN),
    "POTO": Family("POTO", poto_config),
}
