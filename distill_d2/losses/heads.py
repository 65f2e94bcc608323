"""Predictions of both detectors' heads for the same rows, for losses that compare them."""

from __future__ import annotations

import torch

from ..views import Batch, DetectorView, Predictions, require_same_boxes, require_same_classes

#: The proposals that the box heads of both detectors score.
PROPOSALS = ("student", "teacher")


def require_heads(
    student: DetectorView,
    teacher: DetectorView,
    capability: str,
    key: str,
    *,
    proposals: str = "student",
    boxes: bool = True,
) -> None:
    """State that both heads will be compared, and check that they can be.

    Args:
        capability: "dense", "rpn" or "box_head".
        key: config key of the loss, for messages.
        proposals: one of PROPOSALS, those that a box head scores.
        boxes: box deltas are compared, too.

    Raises:
        TypeError: a detector has no such head.
        ValueError: classes, anchors or box parametrizations differ.
    """
    try:
        for view in (student, teacher):
            view.require(capability)
        if capability == "box_head" and proposals == "teacher":
            teacher.require("own_proposals")
    except TypeError as error:
        raise TypeError(
            f"{key}: {error}. Student and teacher must both have a head of one kind: "
            "dense (one-stage detectors) or box_head (Faster and Mask R-CNN with FPN, not C4 or cascade)"
        ) from error
    if capability != "rpn":
        require_same_classes(student, teacher, key)
    if boxes or capability != "box_head":  # rows of dense heads are paired by their anchors
        require_same_boxes(student, teacher, capability, key)


def common_predictions(
    student: DetectorView,
    teacher: DetectorView,
    capability: str,
    batch: Batch | None = None,
    proposals: str = "student",
) -> tuple[Predictions, Predictions]:
    """Both heads' predictions for the same rows. The student's have gradients and, from a box head, the
    classes of the rows.

    Args:
        capability, proposals: see ``require_heads``.
        batch: needed for the teacher's own proposals only.
    """
    if capability != "box_head":
        return getattr(student, capability)(), getattr(teacher, capability)()
    if proposals == "student":
        return student.box_head(), teacher.box_head(student.sampled_proposals())
    if batch is None:
        raise ValueError("the teacher's own proposals need the batch")
    boxes, classes = teacher.own_proposals(batch)
    return student.box_head(boxes, classes), teacher.box_head(boxes)


def object_rows(student: Predictions, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows (N, R) are objects, and which are background; ignored ones are neither.

    Proposals have classes; other rows are objects if the student's own assignment of the ground truth to
    its anchors says so.
    """
    if student.classes is None:
        labels = student.match(batch.truth.boxes, batch.truth.valid)
        return labels == 1, labels == 0
    objects = student.classes < student.num_classes
    return objects & student.row_mask, ~objects & student.row_mask
