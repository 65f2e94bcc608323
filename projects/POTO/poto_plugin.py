"""POTO: its keys, and what distill_d2 needs to know about it."""

from __future__ import annotations

from detectron2.config import CfgNode as CN

from distill_d2.plugins import Detector, register_detector
from distill_d2.rules import COUNT, COUNT_OR_0, FRACTION, NORM, NOT_NEGATIVE, PROBABILITY, Levels, Rule


def add_poto_config(cfg: CN) -> None:
    """Add MODEL.POTO, in place."""
    cfg.MODEL.POTO = node = CN()
    # Foreground classes.
    node.NUM_CLASSES = 80
    # The levels that the head reads; convolutions of its towers, and their norm ("" for none).
    node.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    node.NUM_CONVS = 4
    node.NORM = "GN"
    node.PRIOR_PROB = 0.01
    # The assignment: quality p^(1 - ALPHA) IoU^ALPHA, of locations at most CENTER_SAMPLING_RADIUS strides
    # from the center of an object.
    node.ALPHA = 0.8
    node.CENTER_SAMPLING_RADIUS = 1.5
    # Losses: focal loss, and the weight of the box loss.
    node.FOCAL_ALPHA = 0.25
    node.FOCAL_GAMMA = 2.0
    node.REG_WEIGHT = 2.0
    # 3D max filtering: the side of its window, how many levels above and below together, its norm.
    node.USE_3DMF = False
    node.FILTER_KERNEL_SIZE = 3
    node.FILTER_TAU = 2
    node.FILTER_NORM = "GN"
    # The auxiliary loss, and its number of candidates per object and level.
    node.USE_AUX = False
    node.AUX_TOPK = 9
    # Inference: the lowest score, and the largest number of detections per level; per image it is
    # TEST.DETECTIONS_PER_IMAGE. There is no non-maximum suppression.
    node.SCORE_THRESH_TEST = 0.05
    node.TOPK_CANDIDATES_TEST = 1000


RULES: dict[str, Rule] = {
    "MODEL.POTO.NUM_CLASSES": COUNT,
    "MODEL.POTO.IN_FEATURES": Levels(),
    "MODEL.POTO.NUM_CONVS": COUNT_OR_0,
    "MODEL.POTO.NORM": NORM,
    "MODEL.POTO.PRIOR_PROB": PROBABILITY,
    "MODEL.POTO.ALPHA": FRACTION,
    "MODEL.POTO.CENTER_SAMPLING_RADIUS": NOT_NEGATIVE,
    "MODEL.POTO.FOCAL_ALPHA": FRACTION,
    "MODEL.POTO.FOCAL_GAMMA": NOT_NEGATIVE,
    "MODEL.POTO.REG_WEIGHT": NOT_NEGATIVE,
    "MODEL.POTO.FILTER_KERNEL_SIZE": COUNT,
    "MODEL.POTO.FILTER_TAU": COUNT_OR_0,
    "MODEL.POTO.FILTER_NORM": NORM,
    "MODEL.POTO.AUX_TOPK": COUNT,
    "MODEL.POTO.SCORE_THRESH_TEST": FRACTION,
    "MODEL.POTO.TOPK_CANDIDATES_TEST": COUNT,
}

register_detector(
    Detector(
        "POTO",
        "POTO",
        add_config=add_poto_config,
        num_classes_key="MODEL.POTO.NUM_CLASSES",
        rules=RULES,
        modules=("distill_d2.projects.poto",),
        family="distill_d2.projects.poto.tiny:FAMILY",
    )
)
