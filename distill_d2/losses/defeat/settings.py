"""DeFeat's settings, and the schedules of its weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...views import Batch
from ..heads import PROPOSALS
from ..object_masks import FINEST_SCALE, LEVEL_ASSIGN, LEVEL_ASSIGNS, MASKS
from ..pairing import ADAPTER, INIT_STD
from ..regions import FORMS
from ..settings import LossSettings, key

#: By kind, the factor of all terms at a fraction of the run.
DECAYS = {
    "none": lambda _: 1.0,
    "linear": lambda done: 1 - done,
    "cos": lambda done: 0.5 * math.cos(math.pi * done) + 0.5,
    "up-down": lambda done: 1 + 4 * done if done <= 0.25 else 2 - 2 * (done - 0.25) / 0.75,
}


@dataclass(frozen=True)
class DeFeatSettings(LossSettings):
    """A term with weight 0 is not computed, and neither is what only this term needs."""

    in_features: Sequence[str] = key((), "Neck levels by name; empty: all that both detectors have.")
    hint_neck_w: float = key(3.0, "Weight of the neck in objects.", at_least=0)
    hint_neck_back_w: float = key(12.0, "Weight of the neck in the background.", at_least=0)
    mask: str = key(
        "gt",
        "Objects on a neck level: the cells of ground-truth boxes (gt), cells with an anchor near one "
        "(roi, FGFI's), Gaussians in the boxes (gaussian), or every cell (one).",
        choices=MASKS,
    )
    level_assign: str = key("single", LEVEL_ASSIGN, choices=LEVEL_ASSIGNS)
    finest_scale: float = key(56.0, FINEST_SCALE, above=0)
    roi_phi: float = key(0.5, "Fraction of a box's largest IoU, for the mask roi.", at_least=0, below=1)
    loss_form: str = key("L2", "Distance in the neck and in the backbone.", choices=FORMS)
    neck_adapt: bool = key(True, ADAPTER)
    bb_features: Sequence[str] = key(("res3", "res4", "res5"), "Backbone stages by name.")
    hint_bb_w: float = key(0.0, "Weight of the backbone in objects.", at_least=0)
    hint_bb_back_w: float = key(0.0, "Weight of the backbone in the background.", at_least=0)
    bb_adapt: bool = key(False, "Like NECK_ADAPT, for backbone stages; these adapters end with a ReLU.")
    adapt_kernel_size: int = key(3, "Side of the adapters' kernels.", at_least=1, odd=True)
    adapt_init_std: float = key(0.0001, INIT_STD, at_least=0)
    head_cls_w: float = key(0.0, "Weight of the classes of objects.", at_least=0)
    head_cls_back_w: float = key(0.0, "Weight of the classes of the background.", at_least=0)
    head_cls_t: float = key(1.0, "Temperature of the classes of objects.", above=0)
    head_cls_back_t: float = key(1.0, "Temperature of the classes of the background.", above=0)
    head_cls_rows: str = key(
        "decouple",
        "Objects and background apart (decouple), or one term with HEAD_CLS_W: of all rows, of those "
        "that the teacher classifies correctly (correct), or of the objects among these (cfore).",
        choices=("decouple", "all", "correct", "cfore"),
    )
    predictions: str = key(
        "auto",
        "Heads with a sigmoid per class (dense: RetinaNet, FCOS) or box heads with a softmax "
        "(box_head); auto: what the student has.",
        choices=("auto", "dense", "box_head"),
    )
    proposals: str = key(
        "student",
        "Whose proposals the box heads score; both: those of the student, then those of the teacher.",
        choices=(*PROPOSALS, "both"),
    )
    decay: str = key(
        "none",
        "Factor of all terms over the run: linear from 1 to 0, cos from 1 to 0, or up-down from 1 to 2 "
        "in the first quarter, then to 0.",
        choices=DECAYS,
    )
    reference_bugs: bool = key(False, "smoothL1 inverted, as in the authors' code.")

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = [value for name, value in vars(self).items() if name.endswith("_w")]
        self.require(
            "hint_neck_w", any(w > 0 for w in weights), "at least one of the *_W weights above 0"
        )
        one_term = self.head_cls_rows != "decouple" and self.head_cls_back_w > 0
        expected = "above 0: HEAD_CLS_ROWS has one term, and HEAD_CLS_BACK_W is not its weight"
        self.require("head_cls_w", self.head_cls_w > 0 or not one_term, expected)


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
