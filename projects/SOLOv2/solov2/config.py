"""The keys of SOLOv2, named as AdelaiDet names them, so that its yaml files load."""

from __future__ import annotations

from detectron2.config import CfgNode as CN


def add_solov2_config(cfg: CN) -> None:
    """Add MODEL.SOLOV2, in place."""
    cfg.MODEL.SOLOV2 = node = CN()
    # Foreground classes.
    node.NUM_CLASSES = 80
    # Levels of the instance head; their strides as seen by it, and cells of each level's grid per side.
    node.INSTANCE_IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    node.FPN_INSTANCE_STRIDES = [8, 8, 16, 32, 32]
    node.NUM_GRIDS = [40, 36, 24, 16, 12]
    # Sides of the objects of each level in pixels, both ends included; half of an object's central region,
    # relative to half its sides.
    node.FPN_SCALE_RANGES = ((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048))
    node.SIGMA = 0.2
    # The instance head: channels of the levels, of its convolutions, and of the kernels it predicts.
    node.INSTANCE_IN_CHANNELS = 256
    node.INSTANCE_CHANNELS = 512
    node.NUM_INSTANCE_CONVS = 4
    node.NUM_KERNELS = 256
    node.USE_COORD_CONV = True
    node.NORM = "GN"
    node.PRIOR_PROB = 0.01
    # The mask branch: levels and channels; NUM_MASKS must be NUM_KERNELS.
    node.MASK_IN_FEATURES = ["p2", "p3", "p4", "p5"]
    node.MASK_IN_CHANNELS = 256
    node.MASK_CHANNELS = 128
    node.NUM_MASKS = 256
    # Inference: scores before and after non-maximum suppression, instances likewise, threshold of masks.
    node.SCORE_THR = 0.1
    node.UPDATE_THR = 0.05
    node.NMS_PRE = 500
    node.MAX_PER_IMG = 100
    node.MASK_THR = 0.5
    # "matrix", with NMS_KERNEL "gaussian" or "linear", or "mask".
    node.NMS_TYPE = "matrix"
    node.NMS_KERNEL = "gaussian"
    node.NMS_SIGMA = 2
    node.LOSS = loss = CN()
    loss.FOCAL_USE_SIGMOID = True
    loss.FOCAL_ALPHA = 0.25
    loss.FOCAL_GAMMA = 2.0
    loss.FOCAL_WEIGHT = 1.0
    loss.DICE_WEIGHT = 3.0
    # Read by nothing, there as here: convolutions are never deformable.
    node.USE_DCN_IN_INSTANCE = False
    node.TYPE_DCN = "DCN"
