"""Checks, before training, that the predictions of two detectors can be compared."""

from __future__ import annotations

import torch

from .base import DetectorView


def require_same_classes(student: DetectorView, teacher: DetectorView, loss: str) -> None:
    """Check, for a loss that compares class logits, that both detectors have the same classes.

    Raises:
        ValueError: the numbers of classes differ.
    """
    if student.num_classes == teacher.num_classes:
        teacher.compared_by.append(loss)  # names are compared when the datasets are known
        return
    raise ValueError(
        f"{loss} compares class logits, but the student has {student.num_classes} classes and the "
        f"teacher {teacher.num_classes}. Use a teacher trained on the student's classes, or a loss "
        "on features (MODEL.DISTILLER.TYPES)"
    )


def require_same_boxes(student: DetectorView, teacher: DetectorView, capability: str, loss: str) -> None:
    """Check, for a loss that compares predictions row by row, that both detectors have the same
    anchors and box parametrization.

    Raises:
        ValueError: they differ.
    """
    samples = student.sample_boxes(capability), teacher.sample_boxes(capability)
    for what, a, b in zip(("anchors", "box parametrizations"), *samples):
        if a.shape != b.shape or not torch.allclose(a.cpu(), b.cpu(), rtol=1e-4, atol=1e-3):
            raise ValueError(
                f"{loss} compares the {capability} predictions of student and teacher row by row, but "
                f"their {what} differ: in a sample the student has {_listing(a)}, the teacher "
                f"{_listing(b)}. Use a teacher of the student's kind with the same "
                "MODEL.ANCHOR_GENERATOR and BBOX_REG_WEIGHTS, or a loss on features (MODEL.DISTILLER.TYPES)"
            )


def _listing(boxes: torch.Tensor) -> str:
    first = ", ".join(f"{number:.1f}" for number in boxes[0].tolist())
    last = ", ".join(f"{number:.1f}" for number in boxes[-1].tolist())
    return f"{len(boxes)} boxes, from [{first}] to [{last}]"
