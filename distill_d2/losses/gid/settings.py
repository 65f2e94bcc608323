"""GID's settings, and its conditions on the pooled levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..pairing import ADAPTER
from ..settings import IN_FEATURES, LossSettings, key
from .response import CLS_MODES, REG_MODES
from .selection import SCORES
from .terms import FEATURE_MODES, SCOPES

_BETA = "beta of L1; 0: plain L1."


@dataclass(frozen=True)
class GIDSettings(LossSettings):
    """A term with weight 0 is not computed, and neither is what only this term needs."""

    in_features: Sequence[str] = key((), IN_FEATURES)
    predictions: str = key(
        "auto",
        "Predictions that are compared to find instances, and by the response terms: all anchors or "
        "points of a one-stage head (dense), the proposals that the student samples for its own loss "
        "(box_head), or the objectness of all anchors (rpn); auto: dense where the student has it, else "
        "box_head.",
        choices=("auto", "dense", "rpn", "box_head"),
    )
    gi_mode: str = key(
        "all",
        "Instances that count: all, positive (pos), semi-positive (semi_pos) or negative (neg) ones of "
        "the GI_POST_NMS_TOPK selected, or all ground-truth boxes in their place (gt).",
        choices=("all", "pos", "semi_pos", "neg", "gt"),
    )
    gi_score: str = key(
        "classwise",
        "Score of a row: the largest difference of a class's probabilities (classwise, the paper's) or "
        "the difference of the largest probabilities (max_first, the authors' code).",
        choices=SCORES,
    )
    gi_centerness: bool = key(False, "Multiply probabilities by the centerness (FCOS).")
    gi_nms_thresh: float = key(
        0.3, "A box that overlaps a better one by more IoU is dropped.", at_least=0, at_most=1
    )
    gi_pre_nms_topk: int = key(3000, "Rows per image whose boxes are decoded.", at_least=1)
    gi_post_nms_topk: int = key(10, "K, instances per image.", at_least=1)
    gi_min_side: float = key(10.0, "Instances are wider and higher than this, in pixels.", at_least=0)
    iou_thresholds: Sequence[float] = key(
        (0.4, 0.5),
        "Of an instance without an anchor of an object: part of its area inside ground truth, below "
        "which it is negative, and from which on it is semi-positive.",
    )
    pooler_resolution: int = key(10, "Side of ROIAlign's output.", at_least=1)
    pooler_sampling_ratio: int = key(2, "Samples of ROIAlign per cell and axis.", at_least=1)
    adapter: bool = key(False, ADAPTER)
    adapter_kernel_size: int = key(3, "Side of the adapters' kernels.", at_least=1, odd=True)
    adapter_share_weights: bool = key(True, "One adapter for all levels.")
    feature_weight: float = key(0.0005, "Weight of the feature term.", at_least=0)
    feature_mode: str = key("L2", "Distance of the instances' features.", choices=FEATURE_MODES)
    feature_smooth_l1_beta: float = key(0.0, _BETA, at_least=0)
    relation_weight: float = key(40.0, "Weight of the relation term.", at_least=0)
    relation_smooth_l1_beta: float = key(1.0, "beta of its smooth L1.", at_least=0)
    relation_scope: str = key(
        "batch", "Pairs of instances of the whole batch, or of one image.", choices=SCOPES
    )
    response_mask: str = key(
        "matcher",
        "Rows of an instance: by the student's own matcher, or those whose center is inside the box "
        "(the paper's for FCOS).",
        choices=("matcher", "inside"),
    )
    response_cls_weight: float = key(0.1, "Weight of the classes' response term.", at_least=0)
    response_cls_mode: str = key("BCE", "Distance of class logits.", choices=CLS_MODES)
    response_cls_smooth_l1_beta: float = key(0.0, _BETA, at_least=0)
    response_reg_weight: float = key(1.0, "Weight of the boxes' response term.", at_least=0)
    response_reg_mode: str = key("L1", "Distance of box deltas.", choices=REG_MODES)
    response_reg_smooth_l1_beta: float = key(0.0, _BETA, at_least=0)
    response_reg_mask: str = key(
        "gi",
        "Rows of the boxes' term: those of the classes' term (gi), or those of them that are ground "
        "truth (gi_pos).",
        choices=("gi", "gi_pos"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        thresholds = list(self.iou_thresholds)
        holds = len(thresholds) == 2 and all(isinstance(number, (int, float)) for number in thresholds)
        holds = holds and 0 <= thresholds[0] <= thresholds[1] <= 1
        self.require("iou_thresholds", holds, "two numbers from 0 to 1, the lower one first")
        expected = "at least one of the four terms' weights above 0"
        self.require("feature_weight", self.pools or self.responds, expected)

    @property
    def pools(self) -> bool:
        """Whether features are pooled at the instances."""
        return self.feature_weight > 0 or self.relation_weight > 0

    @property
    def responds(self) -> bool:
        """Whether there is a response term."""
        return self.response_cls_weight > 0 or self.response_reg_weight > 0


def check_strides(strides: dict[str, int]) -> None:
    """Check the strides of the pooled levels, in pixels by name.

    Raises:
        ValueError: they do not double from level to level.
    """
    ordered = sorted(strides.values())
    if ordered != [ordered[0] * 2**index for index in range(len(ordered))]:
        raise ValueError(
            f"MODEL.DISTILLER.GID.IN_FEATURES: the levels have strides {strides}; instances are pooled "
            "from levels of which each has twice the stride of the one before"
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
