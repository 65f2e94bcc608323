"""What a comparison of two profiles means, in words."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode

from .measure import Profile
from .parts import PARTS, REST
from .timing import time_ratio

# A student that takes this share of its teacher's time, or more, is hardly faster ...
_HARDLY = 0.75
# ... and one with more than this share of its parameters is not meant to be.
_SMALLER = 0.9
#: Keys that make the head cheaper, by architecture.
_HEAD_KEYS = {
    "RetinaNet": "MODEL.RETINANET.NUM_CONVS",
    "GeneralizedRCNN": "MODEL.RPN.POST_NMS_TOPK_TEST or MODEL.ROI_BOX_HEAD.FC_DIM",
    "OneStageDetector": "MODEL.FCOS.NUM_CLS_CONVS and NUM_BOX_CONVS",
    "CondInst": "MODEL.FCOS.NUM_CLS_CONVS and NUM_BOX_CONVS",
    "POTO": "MODEL.POTO.NUM_CONVS",
    "SOLOv2": "MODEL.SOLOV2.NUM_INSTANCE_CONVS",
}
_ADVICE = {
    "backbone": "fewer or narrower stages of the backbone",
    "neck": "fewer levels or a smaller MODEL.FPN.OUT_CHANNELS",
    "head": "fewer levels, a smaller MODEL.FPN.OUT_CHANNELS or a smaller head",
    REST: "fewer candidates before and after non-maximum suppression, a higher lowest score",
}


def verdict(student: Profile, teacher: Profile, names: tuple[str, str], config: Any = None) -> str:
    """Whether the student is faster; if it hardly is, which part takes its time, and what would help.

    Args:
        names: of the student and the teacher.
        config: of the student.
    """
    time = time_ratio(student.milliseconds, teacher.milliseconds)
    size = sum(student.parameters.values()) / max(1, sum(teacher.parameters.values()))
    if time < _HARDLY:
        return f"{names[0]} is {1 / time:.1f} times as fast as {names[1]}, with {size:.2f} of its parameters."
    if size > _SMALLER:
        return (
            f"{names[0]} takes {time:.2f} of the time of {names[1]}, with {size:.2f} of its parameters."
        )
    part = max(student.shares, key=lambda each: student.shares[each])
    same = part in PARTS and student.parameters[part] == teacher.parameters[part]
    return (
        f"{names[0]} has {size:.2f} of the parameters of {names[1]}, but {time:.2f} of its time: "
        f"{student.shares[part]:.0%} goes to the {part}{', which is as large in both' if same else ''}. "
        f"What would help: {_advice(part, config)}; or smaller images."
    )


def _advice(part: str, config: Any) -> str:
    architecture = config.MODEL.META_ARCHITECTURE if isinstance(config, CfgNode) else ""
    keys = _HEAD_KEYS.get(architecture, "") if part == "head" else ""
    return f"{_ADVICE[part]}{f' ({keys})' if keys else ''}"
