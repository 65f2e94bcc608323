"""FCOS: its keys, named as AdelaiDet names them so that its yaml files load, and what distill_d2 needs to know
about it."""

from __future__ import annotations

from detectron2.config import CfgNode as CN

from distill_d2.plugins import Detector, register_detector
from distill_d2.rules import (
    COUNT,
    COUNT_OR_0,
    FRACTION,
    NORM,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    Choice,
    Context,
    Levels,
    Rule,
    Sequence,
    Unused,
)


def add_fcos_config(cfg: CN) -> None:
    """Add MODEL.FCOS, MODEL.BiFPN, MODEL.DLA and AdelaiDet's switches, in place."""
    cfg.MODEL.FCOS = node = CN()
    # Foreground classes.
    node.NUM_CLASSES = 80
    # The levels that the head reads, and their strides in pixels.
    node.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    node.FPN_STRIDES = [8, 16, 32, 64, 128]
    # Levels that build_fcos_resnet_fpn_backbone adds after p5: 2 (p6, p7), 1 or 0.
    node.TOP_LEVELS = 2
    # The head: convolutions of both towers, of each, their norm ("GN", "BN", "SyncBN", "NaiveGN" or
    # "none"), a deformable last one, a trainable scale per level.
    node.NUM_SHARE_CONVS = 0
    node.NUM_CLS_CONVS = 4
    node.NUM_BOX_CONVS = 4
    node.NORM = "GN"
    node.USE_DEFORMABLE = False
    node.USE_SCALE = True
    node.PRIOR_PROB = 0.01
    # Targets: locations at most POS_RADIUS strides from the center of an object, or (CENTER_SAMPLE False)
    # anywhere in its box; the largest distance to a side, in pixels, on each level but the last.
    node.CENTER_SAMPLE = True
    node.POS_RADIUS = 1.5
    node.SIZES_OF_INTEREST = [64, 128, 256, 512]
    # Losses: focal loss, and what divides it: "fg" (the positives), "moving_fg" or "all"; box loss
    # "giou", "iou" or "linear_iou"; quality of a box: "ctrness" or "iou".
    node.LOSS_ALPHA = 0.25
    node.LOSS_GAMMA = 2.0
    node.LOSS_NORMALIZER_CLS = "fg"
    node.LOSS_WEIGHT_CLS = 1.0
    node.LOC_LOSS_TYPE = "giou"
    node.BOX_QUALITY = "ctrness"
    # Inference: the lowest score (times the quality if THRESH_WITH_CTR), the largest number of candidates
    # per level before non-maximum suppression, and per image after it. TRAIN is for YIELD_PROPOSAL.
    node.THRESH_WITH_CTR = False
    node.INFERENCE_TH_TRAIN = 0.05
    node.INFERENCE_TH_TEST = 0.05
    node.PRE_NMS_TOPK_TRAIN = 1000
    node.PRE_NMS_TOPK_TEST = 1000
    node.NMS_TH = 0.6
    node.POST_NMS_TOPK_TRAIN = 100
    node.POST_NMS_TOPK_TEST = 100
    # Also return proposals in training, or the box tower's features.
    node.YIELD_PROPOSAL = False
    node.YIELD_BOX_FEATURES = False
    # Not used, as in AdelaiDet: the head always has ReLU.
    node.USE_RELU = True

    cfg.MODEL.BiFPN = node = CN()
    node.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    node.OUT_CHANNELS = 160
    node.NUM_REPEATS = 6
    node.NORM = ""

    cfg.MODEL.DLA = node = CN()
    node.CONV_BODY = "DLA34"
    node.OUT_FEATURES = ["stage2", "stage3", "stage4", "stage5"]
    node.NORM = "FrozenBN"

    _add_unused(cfg)


def _add_unused(cfg: CN) -> None:
    """AdelaiDet's keys that its yaml files may carry, at the values at which they change nothing."""
    cfg.MODEL.MOBILENET = False
    cfg.MODEL.BACKBONE.ANTI_ALIAS = False
    cfg.MODEL.RESNETS.DEFORM_INTERVAL = 1
    cfg.MODEL.TOP_MODULE = CN({"NAME": "conv", "DIM": 16})
    cfg.MODEL.BASIS_MODULE = CN(
        {
            "NAME": "ProtoNet",
            "NUM_BASES": 4,
            "LOSS_ON": False,
            "ANN_SET": "coco",
            "CONVS_DIM": 128,
            "IN_FEATURES": ["p3", "p4", "p5"],
            "NORM": "SyncBN",
            "NUM_CONVS": 3,
            "COMMON_STRIDE": 8,
            "NUM_CLASSES": 80,
            "LOSS_WEIGHT": 0.3,
        }
    )
    cfg.INPUT.CROP.CROP_INSTANCE = True


_UNUSED = "AdelaiDet's key has no effect here"


def _levels(context: Context) -> list[int]:
    """The number of levels."""
    return [len(context.cfg.MODEL.FCOS.IN_FEATURES)]


def _between_levels(context: Context) -> list[int]:
    return [len(context.cfg.MODEL.FCOS.IN_FEATURES) - 1]


#: Of the head, which CondInst has too, of the backbones, and AdelaiDet's switches.
RULES: dict[str, Rule] = {
    "MODEL.FCOS.NUM_CLASSES": COUNT,
    "MODEL.FCOS.IN_FEATURES": Levels(),
    "MODEL.FCOS.FPN_STRIDES": Sequence(COUNT, rising=True, count=_levels),
    "MODEL.FCOS.TOP_LEVELS": Choice((0, 1, 2)),
    "MODEL.FCOS.NUM_SHARE_CONVS": COUNT_OR_0,
    "MODEL.FCOS.NUM_CLS_CONVS": COUNT_OR_0,
    "MODEL.FCOS.NUM_BOX_CONVS": COUNT_OR_0,
    "MODEL.FCOS.NORM": Choice(("GN", "NaiveGN", "BN", "SyncBN", "none")),
    "MODEL.FCOS.PRIOR_PROB": PROBABILITY,
    "MODEL.FCOS.POS_RADIUS": POSITIVE,
    "MODEL.FCOS.SIZES_OF_INTEREST": Sequence(POSITIVE, rising=True, count=_between_levels),
    "MODEL.FCOS.LOSS_ALPHA": FRACTION,
    "MODEL.FCOS.LOSS_GAMMA": NOT_NEGATIVE,
    "MODEL.FCOS.LOSS_NORMALIZER_CLS": Choice(("fg", "moving_fg", "all")),
    "MODEL.FCOS.LOSS_WEIGHT_CLS": NOT_NEGATIVE,
    "MODEL.FCOS.LOC_LOSS_TYPE": Choice(("giou", "iou", "linear_iou")),
    "MODEL.FCOS.BOX_QUALITY": Choice(("ctrness", "iou")),
    "MODEL.FCOS.INFERENCE_TH_TRAIN": FRACTION,
    "MODEL.FCOS.INFERENCE_TH_TEST": FRACTION,
    "MODEL.FCOS.PRE_NMS_TOPK_TRAIN": COUNT,
    "MODEL.FCOS.PRE_NMS_TOPK_TEST": COUNT,
    "MODEL.FCOS.NMS_TH": FRACTION,
    "MODEL.FCOS.POST_NMS_TOPK_TRAIN": COUNT,
    "MODEL.FCOS.POST_NMS_TOPK_TEST": COUNT,
    "MODEL.FCOS.USE_RELU": Unused(True, f"{_UNUSED}: the head always has ReLU"),
    "MODEL.BiFPN.OUT_CHANNELS": COUNT,
    "MODEL.BiFPN.NUM_REPEATS": COUNT,
    "MODEL.BiFPN.NORM": NORM,
    "MODEL.DLA.CONV_BODY": Choice(("DLA34",)),
    "MODEL.DLA.NORM": NORM,
    "MODEL.MOBILENET": Unused(False, f"{_UNUSED}: there is no MobileNet backbone"),
    "MODEL.BACKBONE.ANTI_ALIAS": Unused(False, f"{_UNUSED}: there is no anti-aliased backbone"),
    "MODEL.RESNETS.DEFORM_INTERVAL": Unused(1, _UNUSED),
    "INPUT.CROP.CROP_INSTANCE": Unused(True, f"{_UNUSED}: crops do not follow instances"),
}

register_detector(
    Detector(
        "FCOS (AdelaiDet)",
        "OneStageDetector",
        add_config=add_fcos_config,
        num_classes_key="MODEL.FCOS.NUM_CLASSES",
        rules=RULES,
        modules=("distill_d2.projects.fcos",),
        registers=(
            "FCOS",
            "build_fcos_dla_fpn_backbone",
            "build_fcos_resnet_bifpn_backbone",
            "build_fcos_resnet_fpn_backbone",
        ),
        family="distill_d2.projects.fcos.tiny:FAMILY",
    )
)
