"""The response terms: the heads' outputs on the rows that belong to the instances."""

from __future__ import annotations

from typing import Callable, Optional

import torch
import torch.nn.functional as F

from ...views import Predictions
from ...views.matching import area, intersection
from ...views.predictions import Decode

CLS_MODES = ("BCE", "L1", "L2")
REG_MODES = ("L1", "L2", "BCE", "GIoU")

_EPS = 1e-7
RowLoss = Callable[..., torch.Tensor]


def cls_term(
    student: Predictions,
    teacher: Predictions,
    mask: torch.Tensor,
    *,
    mode: str = "BCE",
    beta: float = 0.0,
) -> torch.Tensor:
    """Distance of the class logits, summed over classes, mean over the rows of the mask.

    "BCE": binary cross-entropy with the teacher's probabilities as targets, whose least value is their
    entropy, not 0; heads with a background class: cross-entropy. "L1", "L2": of the logits.

    Args:
        mask: (N, R) bool.
        beta: of "L1"; 0: plain L1.

    Returns:
        a scalar; 0 without rows.
    """
    cross_entropy = mode == "BCE" and student.background
    loss = _cross_entropy if cross_entropy else _row_loss(mode, beta)
    levels = zip(student.logit_levels, teacher.logit_levels, mask.split(student.level_sizes, dim=1))
    total = sum(_masked_sum(loss, part.view(s.shape[:3]), s, t) for s, t, part in levels)
    return total / mask.sum().clamp(min=1)


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
    "GIoU": 1 - generalised IoU of the decoded boxes. Where classes have deltas of their own, those of
    the teacher's highest foreground class.

    Args, returns: as of ``cls_term``.
    """
    classes = _compared_classes(student, teacher)
    deltas = [student.deltas_of(classes), teacher.deltas_of(classes)]
    if mode == "GIoU":
        values = [*deltas, student.anchors.expand_as(deltas[0])]
        loss = _giou_loss(student.decode)
    else:
        values, loss = deltas, _row_loss(mode, beta)
    total = _masked_sum(loss, mask[..., None], *(value.unsqueeze(2) for value in values))
    return total / mask.sum().clamp(min=1)


def _compared_classes(student: Predictions, teacher: Predictions) -> Optional[torch.Tensor]:
    specific = student.class_specific or teacher.class_specific
    return teacher.best_class() if specific else None


def _row_loss(mode: str, beta: float) -> RowLoss:
    """(student (..., K), teacher (..., K)) -> (...)."""
    if mode == "BCE":
        return lambda s, t: F.binary_cross_entropy_with_logits(s, t.sigmoid(), reduction="none").sum(-1)
    if mode == "L2":
        return lambda s, t: F.mse_loss(s, t, reduction="none").sum(-1)
    return lambda s, t: F.smooth_l1_loss(s, t, reduction="none", beta=beta).sum(-1)


def _giou_loss(decode: Decode) -> RowLoss:
    """(student's deltas (..., 4), teacher's, anchors) -> (...)."""
    return lambda s, t, anchors: _giou_distance(decode(s, anchors), decode(t, anchors))


def _cross_entropy(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return -(teacher.softmax(dim=-1) * student.log_softmax(dim=-1)).sum(dim=-1)


def _masked_sum(loss: RowLoss, mask: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
    """The sum of a loss per row over the rows of the mask (N, P, A), of values (N, P, A, ...)."""
    if mask.device.type != "cpu":
        # To pick rows, the host would have to wait for their number: all are computed, the others of 0.
        values = (value.masked_fill(~mask[..., None], 0.0) for value in values)
        return (loss(*values) * mask).sum()
    image, position, anchor = mask.nonzero(as_tuple=True)
    # Picked in the memory layout of a convolution's output, which the gradient then has as well.
    rows = (value.permute(0, 2, 3, 1)[image, anchor, :, position] for value in values)
    return loss(*rows).sum()


def _giou_distance(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """1 - generalised IoU of boxes (..., 4) and others (..., 4), pair by pair (arXiv 1902.09630).

    fvcore's and torchvision's pick the pairs that overlap, and so wait for the device.
    """
    common = intersection(boxes, others)
    union = area(boxes) + area(others) - common
    corners = torch.minimum(boxes[..., :2], others[..., :2])
    hull = area(torch.cat([corners, torch.maximum(boxes[..., 2:], others[..., 2:])], dim=-1))
    return 1 - common / (union + _EPS) + (hull - union) / (hull + _EPS)
