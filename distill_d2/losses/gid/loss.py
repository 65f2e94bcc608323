"""GID: general instance distillation.

Dai et al., "General Instance Distillation for Object Detection", CVPR 2021, arXiv 2103.02340. At the
boxes where student and teacher disagree most, objects or not, the student imitates the teacher's
features, the distances between the instances' features, and the heads' outputs:

    L = FEATURE_WEIGHT L_feature + RELATION_WEIGHT L_relation
        + RESPONSE_CLS_WEIGHT L_cls + RESPONSE_REG_WEIGHT L_reg

The paper was not at hand: its formulas are known from summaries. Where they leave something open, or
where the configs of daixinghome/Distill_GID_detectron2 differ (no root in the feature term), the
defaults are those configs'; the score is the paper's. All means are of the process's batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import torch

from ...views import (
    Batch,
    DetectorView,
    Predictions,
    require_same_boxes,
    require_same_classes,
)
from ...views.matching import rows_inside
from ..base import DISTILL_LOSS_REGISTRY, DistillLoss, keyword_defaults
from ..heads import common_predictions
from ..pairing import FeaturePairs
from .ground_truth import all_ground_truth, categories
from .pooling import pool
from .response import cls_term, reg_term
from .selection import GeneralInstances, GeneralInstanceSelection
from .settings import check_channels, check_settings, check_strides
from .terms import feature_term, relation_term


@DISTILL_LOSS_REGISTRY.register()
class GID(DistillLoss):
    """General instance distillation; keys in MODEL.DISTILLER.GID."""

    NODE = "GID"

    def __init__(
        self,
        *,
        in_features: Sequence[str] = (),
        predictions: str = "auto",
        gi_mode: str = "all",
        gi_score: str = "classwise",
        gi_centerness: bool = False,
        gi_nms_thresh: float = 0.3,
        gi_pre_nms_topk: int = 3000,
        gi_post_nms_topk: int = 10,
        gi_min_side: float = 10.0,
        iou_thresholds: Sequence[float] = (0.4, 0.5),
        pooler_resolution: int = 10,
        pooler_sampling_ratio: int = 2,
        adapter: bool = False,
        adapter_kernel_size: int = 3,
        adapter_share_weights: bool = True,
        feature_weight: float = 0.0005,
        feature_mode: str = "L2",
        feature_smooth_l1_beta: float = 0.0,
        relation_weight: float = 40.0,
        relation_smooth_l1_beta: float = 1.0,
        relation_scope: str = "batch",
        response_mask: str = "matcher",
        response_cls_weight: float = 0.1,
        response_cls_mode: str = "BCE",
        response_cls_smooth_l1_beta: float = 0.0,
        response_reg_weight: float = 1.0,
        response_reg_mode: str = "L1",
        response_reg_smooth_l1_beta: float = 0.0,
        response_reg_mask: str = "gi",
        **schedule,
    ):
        """
        Args:
            in_features: levels from which instances are pooled; empty: all common neck levels.
            predictions: what is compared to find instances, and by the response terms. "dense": all
                anchors or points of a one-stage head. Of two-stage detectors "box_head": the proposals
                that the student samples for its own loss, scored by both box heads, or "rpn": the
                objectness of all anchors. "auto": dense where detectors have it, else box_head.
            gi_mode: the instances that count, of the K selected: all, pos(itive), semi_pos(itive) or
                neg(ative); or "gt": all ground-truth boxes in their place. In any case of letters.
            gi_score, gi_centerness, gi_nms_thresh, gi_pre_nms_topk, gi_post_nms_topk (K), gi_min_side:
                see GeneralInstanceSelection.
            iou_thresholds: parts of an instance's area inside ground truth, below which one without an
                anchor of an object is negative, and from which it is semi-positive.
            pooler_resolution, pooler_sampling_ratio: of ROIAlign.
            adapter: a convolution on the student's levels even where channels agree; where they differ
                there is always one. adapter_share_weights: one for all levels.
            feature_weight, feature_mode ("L2", "L1", "norm"), feature_smooth_l1_beta: see feature_term.
            relation_weight, relation_smooth_l1_beta, relation_scope: see relation_term.
            response_mask: the rows of an instance: by the student's own "matcher", or those whose
                centre is "inside" its box (the paper's for FCOS).
            response_cls_weight, response_cls_mode ("BCE", "L1", "L2"), ..._beta: see cls_term.
            response_reg_weight, response_reg_mode ("L1", "L2", "BCE", "GIoU"), ..._beta: see reg_term.
            response_reg_mask: "gi": the same rows; "gi_pos": of them those of ground truth.
            schedule: weight, start_iter, stop_iter, warmup_iters of DistillLoss.

        A term with weight 0 is not computed, nor what it alone needs.

        Raises:
            ValueError: a value that cannot be; the message names the key.
        """
        settings = {key: value for key, value in locals().items() if key in keyword_defaults(GID)}
        super().__init__(**schedule)
        self.settings = SimpleNamespace(**{**settings, "gi_mode": gi_mode.lower()})
        check_settings(vars(self.settings))
        self.select = GeneralInstanceSelection(
            score=gi_score,
            centerness=gi_centerness,
            nms_thresh=gi_nms_thresh,
            pre_nms_topk=gi_pre_nms_topk,
            post_nms_topk=gi_post_nms_topk,
            min_side=gi_min_side,
        )
        self.pools = feature_weight > 0 or relation_weight > 0
        self.responds = response_cls_weight > 0 or response_reg_weight > 0
        self.capability = ""  # of the views, from which predictions come: known when bound
        if self.pools:
            self.pairs = FeaturePairs(
                in_features,
                contiguous=False,
                kernel_size=adapter_kernel_size,
                shared=adapter_share_weights,
                always=adapter,
                key="MODEL.DISTILLER.GID.IN_FEATURES, ADAPTER_SHARE_WEIGHTS",
            )

    @property
    def compares_heads(self) -> bool:
        """Whether the detectors' heads are needed at all."""
        return self.responds or self.settings.gi_mode != "gt"

    def bind(self, student: DetectorView, teacher: DetectorView) -> None:
        super().bind(student, teacher)
        if self.pools:
            check_strides(self.pairs.strides)
            shapes = {**teacher.stage_shapes, **teacher.neck_shapes}
            check_channels({name: shapes[name].channels for name in self.pairs.in_features})
        if not self.compares_heads:
            return
        self.capability = self._capability(student)
        for view in (student, teacher):
            self._require_head(view)
        if self.capability != "rpn":
            require_same_classes(student, teacher, "GID")
        require_same_boxes(student, teacher, self.capability, "GID")

    def _require_head(self, view: DetectorView) -> None:
        try:
            view.require(self.capability)
        except TypeError as error:
            raise TypeError(
                f"MODEL.DISTILLER.GID.PREDICTIONS is {self.settings.predictions!r}: {error}. GID "
                "compares heads of one kind, which student and teacher must both have: dense, box_head "
                "or rpn; without heads it works with GI_MODE gt, RESPONSE_CLS_WEIGHT 0.0 and "
                "RESPONSE_REG_WEIGHT 0.0"
            ) from error
        if self.settings.gi_centerness and not view.has_centerness:
            raise ValueError(
                f"MODEL.DISTILLER.GID.GI_CENTERNESS is True, but the {view.role}, a "
                f"{type(view.model).__name__}, predicts no centerness, as FCOS does; set it to False"
            )

    def _capability(self, student: DetectorView) -> str:
        if self.settings.predictions != "auto":
            return self.settings.predictions
        return "dense" if "dense" in student.offers else "box_head"

    def forward(
        self, student: DetectorView, teacher: DetectorView, batch: Batch
    ) -> dict[str, torch.Tensor]:
        """The terms whose weights are not 0, weighted: "loss_gid_feature", "loss_gid_relation",
        "loss_gid_response_cls", "loss_gid_response_reg"."""
        heads = self.predictions(student, teacher) if self.compares_heads else None
        instances = self.instances(heads, batch)
        terms: dict[str, torch.Tensor] = {}
        if self.pools:
            terms.update(self.feature_terms(student, teacher, instances))
        if self.responds:
            terms.update(self.response_terms(*heads, instances, batch))
        return terms

    # What the terms are computed from.

    def predictions(
        self, student: DetectorView, teacher: DetectorView
    ) -> tuple[Predictions, Predictions]:
        """Both heads' predictions for the same rows; the student's carry gradients."""
        return common_predictions(student, teacher, self.capability)

    def instances(self, heads: tuple[Predictions, Predictions] | None, batch: Batch) -> GeneralInstances:
        """The instances of a step, from the predictions of student and teacher (None for "gt")."""
        mode = self.settings.gi_mode
        if mode == "gt":
            return all_ground_truth(batch)
        student, teacher = heads
        instances = self.select(teacher, student, batch.image_sizes)
        if mode == "all":
            return instances
        return replace(instances, valid=self.categories(instances, student, batch)[mode])

    def categories(
        self, instances: GeneralInstances, student: Predictions, batch: Batch
    ) -> dict[str, torch.Tensor]:
        """Which instances (N, K) are "pos", "semi_pos" and "neg"; see ground_truth.categories."""
        return categories(instances, student, batch, self.settings.iou_thresholds)

    def pooled(
        self, student: DetectorView, teacher: DetectorView, instances: GeneralInstances
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both necks' features (N, K, C, side, side) at the instances, the student's adapted."""
        pairs = self.pairs(student, teacher)
        names = sorted(pairs, key=self.pairs.strides.get)
        strides = [self.pairs.strides[name] for name in names]
        s = self.settings
        ours, theirs = (
            pool(levels, strides, instances.boxes, s.pooler_resolution, s.pooler_sampling_ratio)
            for levels in zip(*(pairs[name] for name in names))
        )
        return ours, theirs

    def response_masks(
        self, student: Predictions, instances: GeneralInstances, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Which rows (N, R) belong to instances, for the classification and for the box term."""
        boxes, valid = instances.boxes, instances.valid
        if self.settings.response_mask == "inside":
            mask = rows_inside(boxes, valid, student.anchors)
        else:
            mask = student.match(boxes, valid) == 1
        if student.valid is not None:
            mask = mask & student.valid
        if self.settings.response_reg_mask == "gi":
            return mask, mask
        return mask, mask & (student.match(*batch.padded_boxes()) == 1)

    def feature_terms(
        self, student: DetectorView, teacher: DetectorView, instances: GeneralInstances
    ) -> dict[str, torch.Tensor]:
        """The feature and the relation term, weighted, where their weights are not 0."""
        s = self.settings
        features = (*self.pooled(student, teacher, instances), instances.valid)
        terms = {}
        if s.feature_weight > 0:
            term = feature_term(*features, mode=s.feature_mode, beta=s.feature_smooth_l1_beta)
            terms["loss_gid_feature"] = s.feature_weight * term
        if s.relation_weight > 0:
            beta, scope = s.relation_smooth_l1_beta, s.relation_scope
            term = relation_term(*features, beta=beta, scope=scope)
            terms["loss_gid_relation"] = s.relation_weight * term
        return terms

    def response_terms(
        self, student: Predictions, teacher: Predictions, instances: GeneralInstances, batch: Batch
    ) -> dict[str, torch.Tensor]:
        """The two response terms, weighted, where their weights are not 0."""
        s = self.settings
        cls_mask, reg_mask = self.response_masks(student, instances, batch)
        terms = {}
        if s.response_cls_weight > 0:
            mode, beta = s.response_cls_mode, s.response_cls_smooth_l1_beta
            term = cls_term(student, teacher, cls_mask, mode=mode, beta=beta)
            terms["loss_gid_response_cls"] = s.response_cls_weight * term
        if s.response_reg_weight > 0:
            mode, beta = s.response_reg_mode, s.response_reg_smooth_l1_beta
            term = reg_term(student, teacher, reg_mask, mode=mode, beta=beta)
            terms["loss_gid_response_reg"] = s.response_reg_weight * term
        return terms
