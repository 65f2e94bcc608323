"""General instances and the ground truth: the kind of an instance."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...views import Batch, Predictions
from ...views.matching import batched_ioa
from .selection import GeneralInstances


def all_ground_truth(batch: Batch) -> GeneralInstances:
    """The ground-truth boxes as instances with score 1, instead of a selection."""
    truth = batch.truth
    return GeneralInstances(
        boxes=truth.boxes,
        scores=truth.valid.float(),
        rows=torch.full_like(truth.classes, -1),
        from_teacher=torch.zeros_like(truth.valid),
        valid=truth.valid,
    )


def categories(
    instances: GeneralInstances,
    student: Predictions,
    batch: Batch,
    thresholds: Sequence[float],
) -> dict[str, torch.Tensor]:
    """Which instances are positive, semi-positive or negative; an instance may be none of these.

    "pos": the row of the instance belongs to a ground-truth box by the student's own assignment;
    "semi_pos": it does not, but at least the higher threshold of the instance's area is inside one;
    "neg": it does not, and less than the lower threshold does.

    Returns:
        (N, K) bool by kind; False for empty slots.
    """
    truth = batch.truth
    low, high = thresholds
    positive = student.match(truth.boxes, truth.valid).gather(1, instances.rows) == 1
    covered = batched_ioa(instances.boxes, truth.boxes).amax(dim=-1)  # padding covers nothing
    kinds = {
        "pos": positive,
        "semi_pos": ~positive & (covered >= high),
        "neg": ~positive & (covered < low),
    }
    return {kind: mask & instances.valid for kind, mask in kinds.items()}
