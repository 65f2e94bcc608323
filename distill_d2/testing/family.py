"""A small detector of every kind, and a batch for it: for tests, and for tools/compatibility.py.

A new kind is one more entry of FAMILIES. Those whose meta-architecture is not registered are left out.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Callable

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.structures import BitMasks
from torch import nn

from distill_d2 import add_distill_config
from distill_d2.config import load_yaml
from distill_d2.model_zoo import get_config_file
from distill_d2.plugins import detectors

from .tiny import CLASSES, tiny_batch, tiny_config, tiny_detector


@dataclass(frozen=True)
class Family:
    """A kind of detector.

    Attributes:
        architecture: name of its meta-architecture; "" where detectron2 registers none.
        build: from the width of its stem to a detector.
        batch: two images with objects, as it is trained on.
        stages: of its backbone.
        levels: those on which it predicts boxes, where these are not all of its neck.
        pooled: those at which features are pooled, where these are not all.
    """

    architecture: str
    build: Callable[[int], nn.Module]
    batch: Callable[[], list[dict]] = tiny_batch
    stages: Sequence[str] = ("res2", "res3", "res4")
    levels: Sequence[str] = ()
    pooled: Sequence[str] = ()


def families(known: dict[str, Family] | None = None) -> dict[str, Family]:
    """Those of FAMILIES, or of others, that there are."""
    for detector in detectors().values():
        for module in detector.modules:
            importlib.import_module(module)
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
    cfg = get_cfg()
    add_distill_config(cfg)
    load_yaml(cfg, get_config_file("Base-SSD.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.SSD.WIDTH, cfg.MODEL.SSD.NUM_CLASSES = width / 64, CLASSES
    return cfg


def _dense(width: int, architecture: str) -> CfgNode:
    """On levels p2 to p4, with as many channels as GN needs."""
    cfg = tiny_config("retinanet", width, channels=32)
    cfg.MODEL.META_ARCHITECTURE = architecture
    return cfg


def _polygons() -> list[dict]:
    return tiny_batch(masks=True)


def _bitmasks() -> list[dict]:
    batch = _polygons()
    for item in batch:
        objects = item["instances"]
        objects.gt_masks = BitMasks.from_polygon_masks(objects.gt_masks, *objects.image_size)
    return batch


def _squares() -> list[dict]:
    """Images of one size, 300 x 300 pixels."""
    return tiny_batch(count=1, size=300) * 2


def _built(config: Callable[[int], CfgNode]) -> Callable[[int], nn.Module]:
    return lambda width: _lively(build_model(config(width)))


def _tiny(family: str) -> Callable[[int], nn.Module]:
    return lambda width: _lively(tiny_detector(family, width))


def _lively(model: nn.Module) -> nn.Module:
    """With predictions that differ from place to place, and boxes with an area, unlike a new one's."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and name.rpartition(".")[2] in _OUTPUTS:
            nn.init.normal_(module.weight, std=0.1)
            nn.init.constant_(module.bias, 1.0)
    return model


_OUTPUTS = ("cls_score", "cls_logits", "bbox_pred", "ctrness", "filter", "cate_pred", "kernel_pred")
_RCNN = ("res2", "res3", "res4", "res5")

FAMILIES = {
    "RetinaNet": Family("RetinaNet", _tiny("retinanet")),
    "Faster R-CNN": Family("GeneralizedRCNN", _tiny("faster"), stages=_RCNN),
    "Mask R-CNN": Family("GeneralizedRCNN", _tiny("mask"), _polygons, _RCNN),
    "FCOS (detectron2)": Family("", _tiny("fcos")),
    "SSD": Family("SSD", _built(ssd_config), _squares, ["s16", "s32"], ["s16", "s32"], ["s16"]),
    "FCOS (AdelaiDet)": Family("OneStageDetector", _built(one_stage_config)),
    "CondInst": Family("CondInst", _built(condinst_config), _polygons),
    "SOLOv2": Family("SOLOv2", _built(solov2_config), _bitmasks, _RCNN),
    "POTO": Family("POTO", _built(poto_config)),
}
