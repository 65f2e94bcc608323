"""Both detectors' heads on common rows, for losses that compare them."""

from __future__ import annotations

import torch

from ..views import Batch, DetectorView, Predictions, require_same_boxes, require_same_classes

#: Whose proposals the box heads of both detectors score.
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
        proposals: of PROPOSALS, whose a box head scores.
        boxes: deltas are compared too, not class logits alone.

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
            f"{key}: {error}. It compares heads of one kind, which student and teacher must both have: "
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
    """Both heads' predictions for the same rows; the student's carry gradients and, of a box head, the
    classes of the rows.

    Args: as of ``require_heads``, and the batch, which only the teacher's own proposals need.
    """
    if capability != "box_head":
        return getattr(student, capability)(), getattr(teacher, capability)()
    if proposals == "student":
        ours = student.box_head()
        return ours, teacher.box_head(student.sampled_proposals())
    boxes, classes = teacher.own_proposals(batch)
    return student.box_head(boxes, classes), teacher.box_head(boxes)


def object_rows(student: Predictions, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows (N, R) are objects, and which are background; ignored ones are neither.

    By the classes of the rows where these are known, as of proposals, otherwise by the student's own
    assignment of the ground truth to its anchors.
    """
    if student.classes is None:
        labels = student.match(batch.truth.boxes, batch.truth.valid)
        return labels == 1, labels == 0
    objects = student.classes < student.num_classes
    return objects & student.valid, ~objects & student.valid
