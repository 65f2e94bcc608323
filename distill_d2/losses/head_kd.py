"""HeadKD: the box head imitates the teacher's on the same proposals, in classes and boxes.

Soft targets (Hinton et al. 2015, arXiv 1503.02531) for the second stage of a two-stage detector: both
box heads score the proposals that the student samples for its own loss.

    L = CLS_WEIGHT T^2 mean over proposals of KL(softmax(t / T) || softmax(s / T))
      + REG_WEIGHT mean over object proposals of |s - t|, of the deltas of the object's class

Background is a class. Unlike GID's response, all proposals count, not only those of general instances.
"""

from __future__ import annotations

import math

import torch

from ..views import Batch, DetectorView
from .base import (
    DISTILL_LOSS_REGISTRY,
    DistillLoss,
    check_choices,
    check_not_negative,
    check_setting,
)
from .heads import PROPOSALS, common_predictions, object_rows, require_heads
from .rows import box_mean, class_mean, divergence, row_loss

_REG_MODES = ("L1", "L2")


@DISTILL_LOSS_REGISTRY.register()
class HeadKD(DistillLoss):
    """Distillation of box heads; keys in MODEL.DISTILLER.HEAD_KD."""

    NODE = "HEAD_KD"

    def __init__(
        self,
        *,
        proposals: str = "student",
        cls_weight: float = 1.0,
        temperature: float = 1.0,
        reg_weight: float = 1.0,
        reg_mode: str = "L1",
        reg_smooth_l1_beta: float = 0.0,
        **schedule,
    ):
        """
        Args:
            proposals: those that the "student" samples for its own loss, or the "teacher"'s own (which
                costs its RPN, and a second run of the student's box head).
            cls_weight, temperature: of the class term.
            reg_weight, reg_mode ("L1", "L2"), reg_smooth_l1_beta (of L1; 0: plain L1): of the box term.
            schedule: weight, start_iter, stop_iter, warmup_iters of DistillLoss.

        A term with weight 0 is not computed.

        Raises:
            ValueError: a value that cannot be; the message names the key.
        """
        super().__init__(**schedule)
        check_choices(self.NODE, proposals=(proposals, PROPOSALS), reg_mode=(reg_mode, _REG_MODES))
        check_not_negative(
            self.NODE,
            cls_weight=cls_weight,
            reg_weight=reg_weight,
            reg_smooth_l1_beta=reg_smooth_l1_beta,
        )
        positive = 0 < temperature < math.inf
        check_setting(self.NODE, "temperature", temperature, positive, "a finite number above 0")
        some = cls_weight > 0 or reg_weight > 0
        check_setting(self.NODE, "cls_weight", cls_weight, some, "it or REG_WEIGHT above 0")
        self.proposals = proposals
        self.cls_weight = cls_weight
        self.temperature = temperature
        self.reg_weight = reg_weight
        self.reg_loss = row_loss(reg_mode, reg_smooth_l1_beta)

    def bind(self, student: DetectorView, teacher: DetectorView) -> None:
        require_heads(
            student,
            teacher,
            "box_head",
            "MODEL.DISTILLER.HEAD_KD",
            proposals=self.proposals,
            boxes=self.reg_weight > 0,
        )

    def forward(
        self, student: DetectorView, teacher: DetectorView, batch: Batch
    ) -> dict[str, torch.Tensor]:
        """The terms whose weights are not 0, weighted: "loss_head_kd_cls", "loss_head_kd_reg"."""
        ours, theirs = common_predictions(student, teacher, "box_head", batch, self.proposals)
        terms = {}
        if self.cls_weight > 0:
            loss = divergence(ours.background, self.temperature)
            term = class_mean(loss, ours, theirs, ours.valid, few=False)
            terms["loss_head_kd_cls"] = self.cls_weight * term
        if self.reg_weight > 0:
            objects, _ = object_rows(ours, batch)
            classes = ours.classes.clamp(max=ours.num_classes - 1)
            term = box_mean(self.reg_loss, ours, theirs, objects, classes)
            terms["loss_head_kd_reg"] = self.reg_weight * term
        return terms
