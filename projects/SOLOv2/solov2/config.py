"""The keys of SOLOv2, named as AdelaiDet names them, so that its yaml files load."""

from __future__ import annotations

from collections.abc import Mapping

from detectron2.config import CfgNode as CN
from detectron2.layers import ShapeSpec

from .head import GROUPS, NORMS
from .inference import KERNELS, NMS_TYPES

_PER_LEVEL = ("INSTANCE_IN_FEATURES", "FPN_INSTANCE_STRIDES", "NUM_GRIDS", "FPN_SCALE_RANGES")


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
    # Training: at most so many masks of a batch, drawn by chance, have a loss (-1: all). A mask takes
    # about 20 bytes for each of its cells, one per 4 x 4 pixels.
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
    # Deformable convolutions, which AdelaiDet has the keys of and never uses: True is refused.
    node.USE_DCN_IN_INSTANCE = False
    node.TYPE_DCN = "DCN"


def check_solov2_config(node: CN, levels: Mapping[str, ShapeSpec], divisibility: int) -> None:
    """Check MODEL.SOLOV2.

    Args:
        levels, divisibility: output_shape() and size_divisibility of the backbone.

    Raises:
        ValueError: a value that cannot be; the message names the key.
    """
    _check_choices(node)
    _check_numbers(node)
    lengths = {key: len(node[key]) for key in _PER_LEVEL}
    if len(set(lengths.values())) > 1 or not node.NUM_GRIDS:
        _refuse(", ".join(_PER_LEVEL), lengths, "lists of one length, an element per level")
    pairs = all(map(_is_range, node.FPN_SCALE_RANGES))
    _expect(pairs, node, "FPN_SCALE_RANGES", "pairs (smallest, largest) of sides, one per level")
    _check_levels(node, levels)
    largest = levels[node.MASK_IN_FEATURES[-1]].stride
    whole = f"strides that divide {divisibility}, to whose multiples images are padded; one is {largest}"
    _expect(divisibility % largest == 0, node, "MASK_IN_FEATURES", whole)


def _check_choices(node: CN) -> None:
    choices = {"NORM": NORMS, "NMS_TYPE": NMS_TYPES, "NMS_KERNEL": KERNELS}
    for key, known in choices.items():
        _expect(node[key] in known, node, key, f"one of {list(known)}")
    _expect(not node.USE_DCN_IN_INSTANCE, node, "USE_DCN_IN_INSTANCE", "False, there are none here")
    if not node.LOSS.FOCAL_USE_SIGMOID:
        _refuse("LOSS.FOCAL_USE_SIGMOID", False, "True: the classes' scores are sigmoids")


def _check_numbers(node: CN) -> None:
    equal = f"NUM_MASKS, {node.NUM_MASKS}: a kernel has a weight per channel of the mask features"
    _expect(node.NUM_KERNELS == node.NUM_MASKS, node, "NUM_KERNELS", equal)
    grouped = ["NUM_MASKS"] + (["INSTANCE_CHANNELS", "MASK_CHANNELS"] if node.NORM == "GN" else [])
    for key in grouped:
        multiple = f"a multiple of {GROUPS}, the groups of its norm"
        _expect(node[key] > 0 and node[key] % GROUPS == 0, node, key, multiple)
    for key in ("NUM_CLASSES", "NUM_INSTANCE_CONVS", "NMS_PRE", "MAX_PER_IMG"):
        _expect(node[key] > 0, node, key, "a number above 0")
    for key in ("SIGMA", "NMS_SIGMA"):
        _expect(node[key] > 0, node, key, "a number above 0")
    _expect(0 < node.PRIOR_PROB < 1, node, "PRIOR_PROB", "a number between 0 and 1")
    _expect(0 < node.MASK_THR < 1, node, "MASK_THR", "a number between 0 and 1")
    _expect(all(s > 0 for s in node.NUM_GRIDS), node, "NUM_GRIDS", "numbers above 0")
    most = node.MAX_INSTANCES_TRAIN
    _expect(most > 0 or most == -1, node, "MAX_INSTANCES_TRAIN", "a number above 0, or -1 for all")


def _check_levels(node: CN, levels: Mapping[str, ShapeSpec]) -> None:
    for kind in ("INSTANCE", "MASK"):
        names, channels = node[f"{kind}_IN_FEATURES"], node[f"{kind}_IN_CHANNELS"]
        for name in names:
            known = f"levels of the backbone, which has {list(levels)}"
            _expect(name in levels, node, f"{kind}_IN_FEATURES", known)
            found = levels[name].channels
            _expect(found == channels, node, f"{kind}_IN_CHANNELS", f"{found}, those of {name}")
    strides = [levels[name].stride for name in node.MASK_IN_FEATURES]
    doubling = [strides[0] * 2**index for index in range(len(strides))] if strides else None
    expected = f"levels of which each has twice the stride of the one before; these have {strides}"
    _expect(strides == doubling, node, "MASK_IN_FEATURES", expected)


def _is_range(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and value[0] <= value[1]


def _expect(holds: bool, node: CN, key: str, expected: str) -> None:
    if not holds:
        _refuse(key, node[key], expected)


def _refuse(key: str, found: object, expected: str) -> None:
    raise ValueError(f"MODEL.SOLOV2.{key}: found {found!r}, expected {expected}")
