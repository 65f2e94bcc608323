"""CondInst: its keys, named as AdelaiDet names them so that its yaml files load, and what distill_d2 needs to
know about it."""

from __future__ import annotations

from detectron2.config import CfgNode as CN

from distill_d2.plugins import Detector, register_detector
from distill_d2.rules import COUNT, COUNT_OR_0, COUNT_OR_ALL, NORM, Levels, Rule, Unused


def add_condinst_config(cfg: CN) -> None:
    """Add MODEL.CONDINST, in place."""
    cfg.MODEL.CONDINST = node = CN()
    # Stride in pixels of the predicted masks, a divisor of 8.
    node.MASK_OUT_STRIDE = 4
    # Training: the largest number of instances that have a mask loss, per batch, drawn at random, or per
    # image, the best ones of each object. -1: no limit; set at most one of the two.
    node.MAX_PROPOSALS = -1
    node.TOPK_PROPOSALS_PER_IM = -1
    node.MASK_HEAD = head = CN()
    head.CHANNELS = 8
    head.NUM_LAYERS = 3
    head.DISABLE_REL_COORDS = False
    # Evaluation: the number of masks of an image that are computed together, which bounds memory.
    head.MAX_INSTANCES_PER_PASS = 100
    node.MASK_BRANCH = branch = CN()
    branch.IN_FEATURES = ["p3", "p4", "p5"]
    branch.CHANNELS = 128
    branch.OUT_CHANNELS = 8
    branch.NUM_CONVS = 4
    branch.NORM = "BN"
    # A semantic segmentation as an auxiliary task.
    branch.SEMANTIC_LOSS_ON = False
    # Not used, as in AdelaiDet.
    node.BOTTOM_PIXELS_REMOVED = -1
    head.USE_FP16 = False


RULES: dict[str, Rule] = {
    "MODEL.CONDINST.MASK_OUT_STRIDE": COUNT,
    "MODEL.CONDINST.MAX_PROPOSALS": COUNT_OR_ALL,
    "MODEL.CONDINST.TOPK_PROPOSALS_PER_IM": COUNT_OR_ALL,
    "MODEL.CONDINST.MASK_HEAD.CHANNELS": COUNT,
    "MODEL.CONDINST.MASK_HEAD.NUM_LAYERS": COUNT,
    "MODEL.CONDINST.MASK_HEAD.MAX_INSTANCES_PER_PASS": COUNT,
    "MODEL.CONDINST.MASK_BRANCH.IN_FEATURES": Levels(),
    "MODEL.CONDINST.MASK_BRANCH.CHANNELS": COUNT,
    "MODEL.CONDINST.MASK_BRANCH.OUT_CHANNELS": COUNT,
    "MODEL.CONDINST.MASK_BRANCH.NUM_CONVS": COUNT_OR_0,
    "MODEL.CONDINST.MASK_BRANCH.NORM": NORM,
    "MODEL.CONDINST.BOTTOM_PIXELS_REMOVED": Unused(-1, "no pixels are removed"),
    "MODEL.CONDINST.MASK_HEAD.USE_FP16": Unused(False, "use SOLVER.AMP.ENABLED"),
}

register_detector(
    Detector(
        "CondInst",
        "CondInst",
        add_config=add_condinst_config,
        num_classes_key="MODEL.FCOS.NUM_CLASSES",
        rules=RULES,
        ground_truth=lambda cfg: {"masks"},
        modules=("distill_d2.projects.condinst",),
        family="distill_d2.projects.condinst.tiny:FAMILY",
    )
)
