"""General instances and the ground truth: which kind an instance is."""

from __future__ import annotations

from typing import Dict, Sequence, Tuple

import torch
from torch.nn.utils.rnn import pad_sequence

from ...transfer import upload
from ...views import Batch, Predictions
from ...views.matching import batched_ioa
from .selection import GeneralInstances


def padded_ground_truth(batch: Batch) -> Tuple[torch.Tensor, torch.Tensor]:
    """The ground-truth boxes (N, G, 4) of N images, filled up to the longest, and which are there.

    Raises:
        KeyError: an image has no annotations (it is unlabelled).
    """
    boxes = [item["instances"].gt_boxes.tensor.float() for item in batch.inputs]
    longest = max(1, *(len(per_image) for per_image in boxes))
    valid = torch.stack([torch.arange(longest) < len(per_image) for per_image in boxes])
    padded = pad_sequence([*boxes, boxes[0].new_zeros(longest, 4)], batch_first=True)[:-1]
    device = batch.inputs[0]["image"].device
    return upload(padded, device), upload(valid, device)


def all_ground_truth(batch: Batch) -> GeneralInstances:
    """The ground-truth boxes in the place of a selection, with score 1."""
    boxes, valid = padded_ground_truth(batch)
    return GeneralInstances(
        boxes=boxes,
        scores=valid.float(),
        rows=torch.full_like(valid, -1, dtype=torch.int64),
        from_teacher=torch.zeros_like(valid),
        valid=valid,
    )


def categories(
    instances: GeneralInstances,
    student: Predictions,
    batch: Batch,
    thresholds: Sequence[float],
) -> Dict[str, torch.Tensor]:
    """Which instances are positive, semi-positive or negative; some are none of them.

    "pos": the row of the instance belongs to a ground-truth box by the student's own assignment;
    "semi_pos": it does not, but at least the higher threshold of the instance's area lies in one;
    "neg": it does not, and less than the lower threshold does.

    Returns:
        (N, K) bool by kind; False for empty slots.
    """
    boxes, there = padded_ground_truth(batch)
    low, high = thresholds
    positive = student.match(boxes, there).gather(1, instances.rows) == 1
    covered = batched_ioa(instances.boxes, boxes).amax(dim=-1)  # boxes that fill up cover nothing
    kinds = {
        "pos": positive,
        "semi_pos": ~positive & (covered >= high),
        "neg": ~positive & (covered < low),
    }
    return {kind: mask & instances.valid for kind, mask in kinds.items()}
