"""The terms of Chen et al. (NIPS 2017) on the rows of a head."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...views import Batch, Predictions
from ...views.matching import hard_negatives


def soft_cross_entropy(
    student: torch.Tensor, teacher: torch.Tensor, object_weight: float, background_weight: float
) -> torch.Tensor:
    """Equation 3: -sum over classes of w_c P_t log P_s per row, (...).

    Args:
        student, teacher: (..., K + 1) logits of a softmax, background last, divided by the temperature;
            or (..., 1) logits of a sigmoid for "object" (an RPN's).
        object_weight, background_weight: w_c of the classes, and of the background.
    """
    if student.shape[-1] == 1:
        target = teacher.sigmoid()
        losses = object_weight * target * F.softplus(-student)
        return (losses + background_weight * (1 - target) * F.softplus(student)).squeeze(-1)
    losses = -teacher.softmax(dim=-1) * student.log_softmax(dim=-1)
    return object_weight * losses[..., :-1].sum(dim=-1) + background_weight * losses[..., -1]


def per_box_bound(
    student: torch.Tensor, teacher: torch.Tensor, rows: torch.Tensor, margin: float
) -> torch.Tensor:
    """Equation 5, summed: the student's squared distances of the boxes for which this distance plus the
    margin exceeds the teacher's.

    Args:
        student, teacher: (N, R, 4) differences of deltas to the ground truth's.
        rows: (N, R), the weight of each row; bool, or numbers from 0.
    """
    student, teacher = student.square().sum(dim=-1), teacher.square().sum(dim=-1)
    return torch.where((rows > 0) & (student + margin > teacher), student * rows, 0.0).sum()


def per_batch_bound(
    student: torch.Tensor, teacher: torch.Tensor, rows: torch.Tensor, margin: float
) -> torch.Tensor:
    """The student's mean squared distance over all rows if it plus the margin exceeds the teacher's;
    otherwise 0 (the repository SSD-Knowledge-Distillation). Args: see ``per_box_bound``."""
    count = 4 * rows.sum().clamp(min=1)
    student, teacher = (
        torch.where(rows > 0, distance.square().sum(dim=-1) * rows, 0.0).sum() / count
        for distance in (student, teacher)
    )
    return torch.where(student + margin > teacher, student, 0.0)


def mean_of_rows(values: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """The mean of (N, R, C), without padding rows; valid: (N, R) bool, None: all are."""
    if valid is None:
        return values.mean()
    count = valid.sum().clamp(min=1) * values.shape[-1]
    return torch.where(valid[..., None], values, 0.0).sum() / count


def targets_of(
    predictions: Predictions, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The targets of a head's rows.

    Returns:
        (N, R) bool objects, (N, R) bool background, (N, R) int64 classes of the objects' rows (K of
        others), (N, R, 4) deltas.
    """
    truth = batch.truth
    labels = truth.classes.clamp(max=predictions.num_classes - 1)  # an RPN's one class is "object"
    matched = predictions.match(truth.boxes, truth.valid)
    objects, background = matched == 1, matched == 0
    objects, background = objects & predictions.row_mask, background & predictions.row_mask
    index = predictions.assign(truth.boxes, truth.valid)
    anchors = predictions.anchors.expand(*index.shape, 4)
    boxes = truth.boxes.gather(1, index[..., None].expand_as(anchors))
    classes = torch.where(objects, labels.gather(1, index), predictions.num_classes)
    deltas = predictions.encode(boxes, anchors)
    return objects, background, classes, torch.where(objects[..., None], deltas, 0.0)


def selected_rows(
    predictions: Predictions, objects: torch.Tensor, classes: torch.Tensor, ratio: float
) -> torch.Tensor:
    """Objects and the hardest negatives (N, R), as a student with a background class selects them for
    its own loss (SSD)."""
    logits = predictions.logits.detach()
    losses = F.cross_entropy(logits.flatten(0, 1), classes.flatten(), reduction="none")
    return objects | hard_negatives(losses.view_as(classes), objects, ratio)
