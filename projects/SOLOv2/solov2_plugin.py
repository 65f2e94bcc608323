"""SOLOv2: its keys, named as AdelaiDet names them so that its yaml files load, and what distill_d2 needs to
know about it."""

from __future__ import annotations

from detectron2.config import CfgNode as CN

from distill_d2.plugins import Detector, register_detector
from distill_d2.rules import (
    COUNT,
    COUNT_OR_ALL,
    FRACTION,
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


def add_solov2_config(cfg: CN) -> None:
    """Add MODEL.SOLOV2, in place."""
    cfg.MODEL.SOLOV2 = node = CN()
    # Foreground classes.
    node.NUM_CLASSES = 80
    # Levels of the instance head, fine to coarse; the strides to which it resizes them (and which the
    # areas of their masks, in cells of the mask features, must exceed); cells of their grids per side.
    node.INSTANCE_IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    node.FPN_INSTANCE_STRIDES = [8, 8, 16, 32, 32]
    node.NUM_GRIDS = [40, 36, 24, 16, 12]
    # Sides of the objects of each level in pixels (the root of the box's area), both ends included; the
    # central region of an object, relative to its box.
    node.FPN_SCALE_RANGES = ((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048))
    node.SIGMA = 0.2
    # The instance head: channels of the levels, of its convolutions, and of the kernels it predicts.
    node.INSTANCE_IN_CHANNELS = 256
    node.INSTANCE_CHANNELS = 512
    node.NUM_INSTANCE_CONVS = 4
    node.NUM_KERNELS = 256
    # The position, from -1 to 1, as two more channels of the kernels' tower and of the mask branch's
    # coarsest level.
    node.USE_COORD_CONV = True
    # Of both heads: "GN" or "none".
    node.NORM = "GN"
    node.PRIOR_PROB = 0.01
    # The mask branch: levels, each of twice the stride of the one before, and channels; NUM_MASKS must
    # be NUM_KERNELS.
    node.MASK_IN_FEATURES = ["p2", "p3", "p4", "p5"]
    node.MASK_IN_CHANNELS = 256
    node.MASK_CHANNELS = 128
    node.NUM_MASKS = 256
    # Training: the largest number of masks of a batch, drawn at random, that have a loss (-1: all). A mask
    # takes about 20 bytes for each of its cells, one per 4 x 4 pixels.
    node.MAX_INSTANCES_TRAIN = -1
    # Inference: scores before and after non-maximum suppression, instances likewise, threshold of masks.
    node.SCORE_THR = 0.1
    node.UPDATE_THR = 0.05
    node.NMS_PRE = 500
    node.MAX_PER_IMG = 100
    node.MASK_THR = 0.5
    # "matrix", with NMS_KERNEL "gaussian" or "linear", or "mask", which removes masks whose IoU with a
    # better one of their class exceeds MASK_THR.
    node.NMS_TYPE = "matrix"
    node.NMS_KERNEL = "gaussian"
    node.NMS_SIGMA = 2
    node.LOSS = loss = CN()
    loss.FOCAL_USE_SIGMOID = True
    loss.FOCAL_ALPHA = 0.25
    loss.FOCAL_GAMMA = 2.0
    loss.FOCAL_WEIGHT = 1.0
    loss.DICE_WEIGHT = 3.0
    # Keys of AdelaiDet for deformable convolutions, which are not supported: True is refused.
    node.USE_DCN_IN_INSTANCE = False
    node.TYPE_DCN = "DCN"


def _levels(context: Context) -> list[int]:
    """The number of levels."""
    return [len(context.cfg.MODEL.SOLOV2.INSTANCE_IN_FEATURES)]


RULES: dict[str, Rule] = {
    "MODEL.SOLOV2.NUM_CLASSES": COUNT,
    "MODEL.SOLOV2.INSTANCE_IN_FEATURES": Levels(),
    "MODEL.SOLOV2.FPN_INSTANCE_STRIDES": Sequence(COUNT, count=_levels),
    "MODEL.SOLOV2.NUM_GRIDS": Sequence(COUNT, count=_levels),
    "MODEL.SOLOV2.FPN_SCALE_RANGES": Sequence(Sequence(NOT_NEGATIVE, count=(2,)), count=_levels),
    "MODEL.SOLOV2.SIGMA": POSITIVE,
    "MODEL.SOLOV2.INSTANCE_IN_CHANNELS": COUNT,
    "MODEL.SOLOV2.INSTANCE_CHANNELS": COUNT,
    "MODEL.SOLOV2.NUM_INSTANCE_CONVS": COUNT,
    "MODEL.SOLOV2.NUM_KERNELS": COUNT,
    "MODEL.SOLOV2.NORM": Choice(("GN", "none")),
    "MODEL.SOLOV2.PRIOR_PROB": PROBABILITY,
    "MODEL.SOLOV2.MASK_IN_FEATURES": Levels(),
    "MODEL.SOLOV2.MASK_IN_CHANNELS": COUNT,
    "MODEL.SOLOV2.MASK_CHANNELS": COUNT,
    "MODEL.SOLOV2.NUM_MASKS": COUNT,
    "MODEL.SOLOV2.MAX_INSTANCES_TRAIN": COUNT_OR_ALL,
    "MODEL.SOLOV2.SCORE_THR": FRACTION,
    "MODEL.SOLOV2.UPDATE_THR": FRACTION,
    "MODEL.SOLOV2.NMS_PRE": COUNT,
    "MODEL.SOLOV2.MAX_PER_IMG": COUNT,
    "MODEL.SOLOV2.MASK_THR": PROBABILITY,
    "MODEL.SOLOV2.NMS_TYPE": Choice(("matrix", "mask")),
    "MODEL.SOLOV2.NMS_KERNEL": Choice(("gaussian", "linear")),
    "MODEL.SOLOV2.NMS_SIGMA": POSITIVE,
    "MODEL.SOLOV2.LOSS.FOCAL_USE_SIGMOID": Unused(True, "the classes' scores are sigmoids"),
    "MODEL.SOLOV2.LOSS.FOCAL_ALPHA": FRACTION,
    "MODEL.SOLOV2.LOSS.FOCAL_GAMMA": NOT_NEGATIVE,
    "MODEL.SOLOV2.LOSS.FOCAL_WEIGHT": NOT_NEGATIVE,
    "MODEL.SOLOV2.LOSS.DICE_WEIGHT": NOT_NEGATIVE,
    "MODEL.SOLOV2.USE_DCN_IN_INSTANCE": Unused(False, "there are no deformable convolutions"),
}

register_detector(
    Detector(
        "SOLOv2",
        "SOLOv2",
        add_config=add_solov2_config,
        num_classes_key="MODEL.SOLOV2.NUM_CLASSES",
        rules=RULES,
        ground_truth=lambda cfg: {"masks"},
        modules=("distill_d2.projects.solov2",),
        family="distill_d2.projects.solov2.tiny:FAMILY",
    )
)
