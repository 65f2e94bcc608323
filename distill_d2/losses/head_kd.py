"""HeadKD: the box head imitates the teacher's on the same proposals, in classes and boxes.

Soft targets (Hinton et al. 2015, arXiv 1503.02531) for the second stage of a two-stage detector: both
box heads score the proposals that the student samples for its own loss.

    L = CLS_WEIGHT T^2 mean over proposals of KL(softmax(t / T) || softmax(s / T))
      + REG_WEIGHT mean over object proposals of |s - t|, of the deltas of the object's class

Background is a class. Unlike GID's response, all proposals count, not only those of general instances.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..views import Batch, DetectorView
from .base import DISTILL_LOSS_REGISTRY, DistillLoss
from .heads import PROPOSALS, common_predictions, object_rows, require_heads
from .rows import box_mean, class_mean, divergence, row_loss
from .settings import LossSettings, key


@dataclass(frozen=True)
class HeadKDSettings(LossSettings):
    proposals: str = key(
        "student",
        "Proposals that both box heads score: those that the student samples for its own loss, or the "
        "teacher's (this costs the teacher's RPN and a second run of the student's box head).",
        choices=PROPOSALS,
    )
    cls_weight: float = key(1.0, "Weight of the class term; 0: it is not computed.", at_least=0)
    temperature: float = key(1.0, "T of the class term.", above=0)
    reg_weight: float = key(1.0, "Weight of the box term; 0: it is not computed.", at_least=0)
    reg_mode: str = key("L1", "Distance of box deltas.", choices=("L1", "L2"))
    reg_smooth_l1_beta: float = key(0.0, "beta of L1; 0: plain L1.", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        computes = self.cls_weight > 0 or self.reg_weight > 0
        self.require("cls_weight", computes, "CLS_WEIGHT or REG_WEIGHT above 0")


@DISTILL_LOSS_REGISTRY.register()
class HeadKD(DistillLoss):
    """Distillation of box heads; keys in MODEL.DISTILLER.HEAD_KD."""

    NODE = "HEAD_KD"
    Settings = HeadKDSettings
    settings: HeadKDSettings

    def bind(self, student: DetectorView, teacher: DetectorView) -> None:
        require_heads(
            student,
            teacher,
            "box_head",
            "MODEL.DISTILLER.HEAD_KD",
            proposals=self.settings.proposals,
            boxes=self.settings.reg_weight > 0,
        )

    def forward(
        self, student: DetectorView, teacher: DetectorView, batch: Batch
    ) -> dict[str, torch.Tensor]:
        """The terms whose weights are not 0, weighted: "loss_head_kd_cls", "loss_head_kd_reg"."""
        s = self.settings
        rows = common_predictions(student, teacher, "box_head", batch, s.proposals)
        terms = {}
        if s.cls_weight > 0:
            loss = divergence(rows[0].background, s.temperature)
            term = class_mean(loss, *rows, rows[0].row_mask, sparse=False)
            terms["loss_head_kd_cls"] = s.cls_weight * term
        if s.reg_weight > 0:
            objects, _ = object_rows(rows[0], batch)
            loss = row_loss(s.reg_mode, s.reg_smooth_l1_beta)
            terms["loss_head_kd_reg"] = s.reg_weight * box_mean(loss, *rows, objects, rows[0].classes)
        return terms
