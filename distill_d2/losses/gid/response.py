"""The response terms: the heads' outputs on the rows that belong to the instances."""

from __future__ import annotations

import torch

from ...views import Predictions
from ...views.matching import giou_distance
from ...views.predictions import Decode
from ..rows import RowLoss, box_mean, class_mean, row_loss

CLS_MODES = ("BCE", "L1", "L2")
REG_MODES = ("L1", "L2", "BCE", "GIoU")


def cls_term(
    student: Predictions,
    teacher: Predictions,
    mask: torch.Tensor,
    *,
    mode: str = "BCE",
    beta: float = 0.0,
) -> torch.Tensor:
    """Distance of the class logits, summed over classes, mean over the rows of the mask.

    "BCE": binary cross-entropy with the teacher's probabilities as targets (its minimum is their entropy,
    not 0); heads with a background class: cross-entropy. "L1", "L2": of the logits.

    Args:
        mask: (N, R) bool.
        beta: of "L1"; 0: plain L1.

    Returns:
        a scalar; 0 without rows.
    """
    cross_entropy = mode == "BCE" and student.background
    loss = _cross_entropy if cross_entropy else row_loss(mode, beta)
    return class_mean(loss, student, teacher, mask)


def reg_term(
    student: Predictions,
    teacher: Predictions,
    mask: torch.Tensor,
    *,
    mode: str = "L1",
    beta: float = 0.0,
) -> torch.Tensor:
    """Distance of the box deltas, summed over the four, mean over the rows of the mask.

    "L1", "L2" and "BCE" (with the sigmoid of the teacher's as targets) of the deltas as they are;
    "GIoU": 1 - generalized IoU of the decoded boxes. If each class has its own deltas, those of
    the teacher's highest foreground class.

    Args, returns: see ``cls_term``.
    """
    classes = _compared_classes(student, teacher)
    if mode != "GIoU":
        return box_mean(row_loss(mode, beta), student, teacher, mask, classes)
    anchors = student.anchors.expand(*mask.shape, 4)
    return box_mean(_giou_loss(student.decode), student, teacher, mask, classes, anchors)


def _compared_classes(student: Predictions, teacher: Predictions) -> torch.Tensor | None:
    specific = student.class_specific or teacher.class_specific
    return teacher.best_class() if specific else None


def _giou_loss(decode: Decode) -> RowLoss:
    """(student's deltas (..., 4), teacher's, anchors) -> (...)."""
    return lambda s, t, anchors: giou_distance(decode(s, anchors), decode(t, anchors))


def _cross_entropy(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return -(teacher.softmax(dim=-1) * student.log_softmax(dim=-1)).sum(dim=-1)
