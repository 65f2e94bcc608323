"""GID: general instance distillation.

Dai et al., "General Instance Distillation for Object Detection", CVPR 2021, arXiv 2103.02340. At the
boxes where student and teacher disagree most, objects or not, the student imitates the teacher's
features, the distances between the instances' features, and the heads' outputs:

    L = FEATURE_WEIGHT L_feature + RELATION_WEIGHT L_relation
        + RESPONSE_CLS_WEIGHT L_cls + RESPONSE_REG_WEIGHT L_reg

Formulas follow summaries of the paper and daixinghome/Distill_GID_detectron2, whose configs decide where
the two differ (no root in the feature term), except for the score, which is the paper's; not yet checked
against the paper. All means are over the process's batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ...views import (
    Batch,
    DetectorView,
    Predictions,
    require_same_boxes,
    require_same_classes,
)
from ...views.matching import rows_inside
from ..base import DISTILL_LOSS_REGISTRY, DistillLoss
from ..heads import common_predictions
from ..pairing import FeaturePairs
from .ground_truth import all_ground_truth, categories
from .pooling import pool
from .response import cls_term, reg_term
from .selection import GeneralInstances, GeneralInstanceSelection
from .settings import GIDSettings, check_channels, check_strides
from .terms import feature_term, relation_term


@DISTILL_LOSS_REGISTRY.register()
class GID(DistillLoss):
    """General instance distillation; keys in MODEL.DISTILLER.GID."""

    NODE = "GID"

    Settings = GIDSettings
    settings: GIDSettings

    def __init__(self, **keys: Any):
        if "gi_mode" in keys:
            keys["gi_mode"] = str(keys["gi_mode"]).lower()  # the reference's configs have capitals
        super().__init__(**keys)
        s = self.settings
        self.select = GeneralInstanceSelection(
            score=s.gi_score,
            centerness=s.gi_centerness,
            nms_thresh=s.gi_nms_thresh,
            pre_nms_topk=s.gi_pre_nms_topk,
            post_nms_topk=s.gi_post_nms_topk,
            min_side=s.gi_min_side,
        )
        self.capability = ""  # kind of head that is compared; known when bound
        if s.pools:
            self.pairs = FeaturePairs(
                s.in_features,
                contiguous=False,
                kernel_size=s.adapter_kernel_size,
                shared=s.adapter_share_weights,
                always=s.adapter,
                key="MODEL.DISTILLER.GID.IN_FEATURES, ADAPTER_SHARE_WEIGHTS",
            )

    @property
    def compares_heads(self) -> bool:
        """Whether the detectors' heads are needed at all."""
        return self.settings.responds or self.settings.gi_mode != "gt"

    def bind(self, student: DetectorView, teacher: DetectorView) -> None:
        if self.settings.pools:
            super().bind(student, teacher)
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
                f"MODEL.DISTILLER.GID.PREDICTIONS is {self.settings.predictions!r}: {error}. Student "
                "and teacher must both have a head of one kind: dense, box_head or rpn. Without heads GID "
                "works with GI_MODE gt, RESPONSE_CLS_WEIGHT 0.0 and "
                "RESPONSE_REG_WEIGHT 0.0"
            ) from error
        if self.settings.gi_centerness and not view.has_centerness:
            raise ValueError(
                f"MODEL.DISTILLER.GID.GI_CENTERNESS is True, but the {view.role}, a "
                f"{type(view.model).__name__}, predicts no centerness (FCOS does); set it to False"
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
        if self.settings.pools:
            terms.update(self.feature_terms(student, teacher, instances))
        if self.settings.responds and heads is not None:
            terms.update(self.response_terms(*heads, instances, batch))
        return terms

    def predictions(
        self, student: DetectorView, teacher: DetectorView
    ) -> tuple[Predictions, Predictions]:
        """Both heads' predictions for the same rows; the student's have gradients."""
        return common_predictions(student, teacher, self.capability)

    def instances(self, heads: tuple[Predictions, Predictions] | None, batch: Batch) -> GeneralInstances:
        """The instances of a step, from the predictions of student and teacher (None for "gt")."""
        mode = self.settings.gi_mode
        if mode == "gt" or heads is None:
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
        names = sorted(pairs, key=lambda name: self.pairs.strides[name])
        strides = [self.pairs.strides[name] for name in names]
        s = self.settings
        of_student, of_teacher = (
            pool(levels, strides, instances.boxes, s.pooler_resolution, s.pooler_sampling_ratio)
            for levels in zip(*(pairs[name] for name in names))
        )
        return of_student, of_teacher

    def response_masks(
        self, student: Predictions, instances: GeneralInstances, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Which rows (N, R) belong to instances, for the classification and for the box term."""
        boxes, valid = instances.boxes, instances.valid
        if self.settings.response_mask == "inside":
            mask = rows_inside(boxes, valid, student.anchors)
        else:
            mask = student.match(boxes, valid) == 1
        mask = mask & student.row_mask
        if self.settings.response_reg_mask == "gi":
            return mask, mask
        return mask, mask & (student.match(batch.truth.boxes, batch.truth.valid) == 1)

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
