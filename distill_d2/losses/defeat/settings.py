"""What DeFeat's settings may be."""

from __future__ import annotations

import math
from typing import Any

from ...views import Batch
from ..base import check_choices, check_not_negative, check_odd, check_setting
from ..heads import PROPOSALS
from ..masks import LEVEL_ASSIGNS, MASKS
from ..regions import FORMS
from .classes import ROWS

PREDICTIONS = ("auto", "dense", "box_head")

#: By kind, the factor of all terms at a fraction of the run.
DECAYS = {
    "none": lambda _: 1.0,
    "linear": lambda done: 1 - done,
    "cos": lambda done: 0.5 * math.cos(math.pi * done) + 0.5,
    "up-down": lambda done: 1 + 4 * done if done <= 0.25 else 2 - 2 * (done - 0.25) / 0.75,
}


def check_settings(node: str, s: dict[str, Any]) -> None:
    """Check DeFeat's arguments, by name.

    Raises:
        ValueError: one cannot be; the message names its key.
    """
    check_choices(
        node,
        mask=(s["mask"], MASKS),
        level_assign=(s["level_assign"], LEVEL_ASSIGNS),
        loss_form=(s["loss_form"], FORMS),
        head_cls_rows=(s["head_cls_rows"], ROWS),
        predictions=(s["predictions"], PREDICTIONS),
        proposals=(s["proposals"], (*PROPOSALS, "both")),
        decay=(s["decay"], DECAYS),
    )
    weights = {name: value for name, value in s.items() if name.endswith("_w")}
    check_not_negative(node, adapt_init_std=s["adapt_init_std"], **weights)
    check_odd(node, adapt_kernel_size=s["adapt_kernel_size"])
    check_setting(node, "roi_phi", s["roi_phi"], 0 <= s["roi_phi"] < 1, "0 to below 1")
    for name in ("finest_scale", "head_cls_t", "head_cls_back_t"):
        check_setting(node, name, s[name], 0 < s[name] < math.inf, "a finite number above 0")
    some = any(value > 0 for value in weights.values())
    check_setting(node, "hint_neck_w", s["hint_neck_w"], some, "at least one of the *_W weights above 0")
    alone = s["head_cls_rows"] != "decouple" and s["head_cls_back_w"] > 0
    expected = "above 0: HEAD_CLS_ROWS has one term, and HEAD_CLS_BACK_W is not its weight"
    check_setting(node, "head_cls_w", s["head_cls_w"], s["head_cls_w"] > 0 or not alone, expected)


def decay_factor(kind: str, batch: Batch) -> float:
    """The factor of DECAYS at the batch's iteration.

    Raises:
        ValueError: the length of the run is not known.
    """
    if kind == "none":
        return 1.0
    if batch.max_iter < 1:
        raise ValueError(
            f"MODEL.DISTILLER.DEFEAT.DECAY is {kind!r}, but the length of the run is not known; give "
            "Distiller(max_iter=...), or set it to 'none'"
        )
    return DECAYS[kind](min(batch.iteration / batch.max_iter, 1.0))
