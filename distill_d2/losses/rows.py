"""Losses on the rows of two detectors' Predictions: distances per row, and sums over some of them."""

from __future__ import annotations

from typing import Callable

import torch
import torch.nn.functional as F

from ..views import Predictions

RowLoss = Callable[..., torch.Tensor]


def row_loss(mode: str, beta: float) -> RowLoss:
    """(student (..., K), teacher (..., K)) -> (...): "BCE" with the sigmoid of the teacher's as targets,
    "L2", or "L1", smooth with this beta; the sum over K."""
    if mode == "BCE":
        return lambda s, t: F.binary_cross_entropy_with_logits(s, t.sigmoid(), reduction="none").sum(-1)
    if mode == "L2":
        return lambda s, t: F.mse_loss(s, t, reduction="none").sum(-1)
    return lambda s, t: F.smooth_l1_loss(s, t, reduction="none", beta=beta).sum(-1)


def divergence(background: bool, temperature: float) -> RowLoss:
    """(student (..., K), teacher (..., K)) logits -> (...): how far the student's class probabilities
    are from the teacher's, T^2 KL(teacher || student) of logits / T (Hinton et al. 2015,
    arXiv 1503.02531); exactly 0 where both are equal.

    Args:
        background: probabilities are a softmax; otherwise each class has a sigmoid, and the sum over
            classes of their divergences is taken.
        temperature: T.
    """
    distance = _softmax_divergence if background else _sigmoid_divergence
    return lambda s, t: distance(s / temperature, t / temperature) * temperature**2


def _softmax_divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    target = teacher.log_softmax(dim=-1)
    return (target.exp() * (target - student.log_softmax(dim=-1))).sum(dim=-1)


def _sigmoid_divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    # With q = sigmoid(t), BCE(s, q) - BCE(t, q).
    target = teacher.sigmoid()
    return (F.softplus(student) - F.softplus(teacher) - target * (student - teacher)).sum(dim=-1)


def class_mean(
    loss: RowLoss, student: Predictions, teacher: Predictions, mask: torch.Tensor, *, sparse: bool = True
) -> torch.Tensor:
    """The mean of a loss on the class logits over the rows of the mask (N, R); 0 without rows.

    Args:
        sparse: the mask has few of the rows, so selecting them first is faster on a CPU.
    """
    levels = zip(student.logit_levels, teacher.logit_levels, mask.split(student.level_sizes, dim=1))
    total = sum(masked_sum(loss, part.view(s.shape[:3]), s, t, sparse=sparse) for s, t, part in levels)
    return total / mask.sum().clamp(min=1)


def box_mean(
    loss: RowLoss,
    student: Predictions,
    teacher: Predictions,
    mask: torch.Tensor,
    classes: torch.Tensor | None,
    *others: torch.Tensor,
) -> torch.Tensor:
    """The mean of a loss on the box deltas over the rows of the mask (N, R); 0 without rows.

    Args:
        classes: (N, R) int64, whose deltas are compared; read only if each class has its own.
        others: (N, R, 4) each, which the loss takes as well.
    """
    values = [student.deltas_of(classes), teacher.deltas_of(classes), *others]
    total = masked_sum(loss, mask[..., None], *(value.unsqueeze(2) for value in values))
    return total / mask.sum().clamp(min=1)


def masked_sum(
    loss: RowLoss, mask: torch.Tensor, *values: torch.Tensor, sparse: bool = True
) -> torch.Tensor:
    """The sum of a loss per row over the rows of the mask (N, P, A), of values (N, P, A, ...)."""
    if mask.device.type != "cpu" or not sparse:
        # Selecting rows would wait for their number, so all are computed, those outside the mask from 0.
        zeroed = [value.masked_fill(~mask[..., None], 0.0) for value in values]
        return (loss(*zeroed) * mask).sum()
    image, position, anchor = mask.nonzero(as_tuple=True)
    # In the memory layout of a convolution's output, so that the gradient has this layout, too.
    rows = (value.permute(0, 2, 3, 1)[image, anchor, :, position] for value in values)
    return loss(*rows).sum()
