"""Checks of MODEL.SOLOV2, when the model is built."""

from __future__ import annotations

from collections.abc import Mapping

from detectron2.config import CfgNode as CN
from detectron2.layers import ShapeSpec

from .head import GROUPS, NORMS
from .inference import KERNELS, NMS_TYPES

_PER_LEVEL = ("INSTANCE_IN_FEATURES", "FPN_INSTANCE_STRIDES", "NUM_GRIDS", "FPN_SCALE_RANGES")


def check_solov2_config(node: CN, levels: Mapping[str, ShapeSpec], divisibility: int) -> None:
    """Check MODEL.SOLOV2.

    Args:
        levels, divisibility: output_shape() and size_divisibility of the backbone.

    Raises:
        ValueError: a value is out of range, or does not fit the backbone; the message names the key.
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
    _expect(
        not node.USE_DCN_IN_INSTANCE,
        node,
        "USE_DCN_IN_INSTANCE",
        "False; this SOLOv2 has no deformable convolutions",
    )
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
