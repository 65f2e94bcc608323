"""What GID's settings may be."""

from __future__ import annotations

from typing import Any

from ..base import check_choices, check_not_negative, check_odd, check_setting
from .response import CLS_MODES, REG_MODES
from .selection import SCORES
from .terms import FEATURE_MODES, SCOPES

_GI_MODES = ("all", "pos", "semi_pos", "neg", "gt")
_PREDICTIONS = ("auto", "dense", "rpn", "box_head")
_RESPONSE_MASKS = ("matcher", "inside")
_REG_MASKS = ("gi", "gi_pos")


def check_settings(s: dict[str, Any]) -> None:
    """Check GID's arguments, by name.

    Raises:
        ValueError: one cannot be; the message names its key.
    """
    choices = {
        "predictions": _PREDICTIONS,
        "gi_mode": _GI_MODES,
        "gi_score": SCORES,
        "feature_mode": FEATURE_MODES,
        "relation_scope": SCOPES,
        "response_mask": _RESPONSE_MASKS,
        "response_cls_mode": CLS_MODES,
        "response_reg_mode": REG_MODES,
        "response_reg_mask": _REG_MASKS,
    }
    check_choices("GID", **{name: (s[name], allowed) for name, allowed in choices.items()})
    for name in ("gi_pre_nms_topk", "gi_post_nms_topk", "pooler_resolution", "pooler_sampling_ratio"):
        _require(s, name, s[name] >= 1, "at least 1")
    numbers = {name: s[name] for name in s if name.endswith(("_weight", "_beta", "gi_min_side"))}
    check_not_negative("GID", **numbers)
    _require(s, "gi_nms_thresh", 0 <= s["gi_nms_thresh"] <= 1, "0 to 1")
    check_odd("GID", adapter_kernel_size=s["adapter_kernel_size"])
    thresholds = list(s["iou_thresholds"])
    holds = len(thresholds) == 2 and all(isinstance(number, (int, float)) for number in thresholds)
    holds = holds and 0 <= thresholds[0] <= thresholds[1] <= 1
    _require(s, "iou_thresholds", holds, "two numbers from 0 to 1, the lower one first")
    weights = ("feature_weight", "relation_weight", "response_cls_weight", "response_reg_weight")
    holds = any(s[name] > 0 for name in weights)
    _require(s, "feature_weight", holds, "at least one of the four terms' weights above 0")


def _require(settings: dict[str, Any], name: str, holds: bool, expected: str) -> None:
    check_setting("GID", name, settings[name], holds, expected)


def check_strides(strides: dict[str, int]) -> None:
    """Check the strides of the pooled levels, in pixels by name.

    Raises:
        ValueError: they do not double from level to level.
    """
    found = sorted(strides.values())
    if found == [found[0] * 2**index for index in range(len(found))]:
        return
    raise ValueError(
        f"MODEL.DISTILLER.GID.IN_FEATURES: the levels have strides {strides}; instances are pooled from "
        "levels of which each has twice the stride of the one before"
    )


def check_channels(channels: dict[str, int]) -> None:
    """Check the channels of the teacher's pooled levels, by name.

    Raises:
        ValueError: they differ.
    """
    if len(set(channels.values())) > 1:
        raise ValueError(
            f"MODEL.DISTILLER.GID.IN_FEATURES: the teacher's levels have {channels} channels; instances "
            "are pooled from levels of equal channels. Choose such levels, or set FEATURE_WEIGHT and "
            "RELATION_WEIGHT to 0.0"
        )
