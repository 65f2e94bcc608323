"""Check, before training, that the classes of datasets, student, teacher and checkpoints are the same."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .. import plugins
from ..data.classes import check_same_classes, classes_of, listing, moved_class
from ..distiller import Distiller
from ..teacher import Teacher
from ..views import view_type

#: Predictions of a teacher that are read class by class.
_CLASSIFIES = {"dense", "box_head", "score_boxes"}


def check_number(student: nn.Module, datasets: Sequence[str]) -> None:
    """Check that a detector, whatever built it, has as many classes as the datasets, where both are known.

    Raises:
        ValueError: it has more or fewer.
    """
    classes = classes_of(datasets)
    if classes is None or not isinstance(getattr(student, "backbone", None), nn.Module):
        return
    count = view_type(student)(student, "student").num_classes
    if count in (None, len(classes)):
        return
    keys = [
        each.num_classes_key for each in plugins.of_base_class(type(student)) if each.num_classes_key
    ]
    advice = f" (for a class derived from detectron2's: {keys[0]})" if keys else ""
    raise ValueError(
        f"the student, a {type(student).__name__}, has {count} classes, but dataset '{datasets[0]}' has "
        f"{listing(classes)}; set its number of classes to {len(classes)}{advice}"
    )


def check_teacher(distiller: Distiller, datasets: Sequence[str]) -> None:
    """Check the teacher's classes where losses compare its class outputs with the student's by number.

    Raises:
        ValueError: a class has different numbers.
    """
    view = distiller.teacher.view
    uses = view.compared_by or sorted(view.required & _CLASSIFIES)
    if uses:
        _compare(distiller.teacher, datasets, f"Losses compare them by number ({', '.join(uses)})")


def check_preload(distiller: Distiller, datasets: Sequence[str]) -> None:
    """Check that PRELOAD_HEAD does not start the student's classes from others of the teacher.

    Raises:
        ValueError: a class has different numbers, and the layers fit.
    """
    classes, others = classes_of(datasets), distiller.teacher.classes
    if distiller.preload_head and len(classes or ()) == len(others or ()):  # otherwise they are skipped
        _compare(distiller.teacher, datasets, "Set MODEL.DISTILLER.PRELOAD_HEAD to False")


def check_tested_teacher(teacher: Teacher, datasets: Sequence[str]) -> None:
    """Check that an evaluation on these datasets takes the teacher's classes for the right ones.

    Raises:
        ValueError: a class has different numbers.
    """
    _compare(teacher, datasets, "Set MODEL.DISTILLER.EVAL_TEACHER to False")


def _compare(teacher: Teacher, datasets: Sequence[str], use: str) -> None:
    if moved_class(classes_of(datasets), teacher.classes):
        check_same_classes(
            f"dataset '{datasets[0]}'",
            classes_of(datasets),
            f"the teacher ({teacher.source})",
            teacher.classes,
            f"{use}, or use a teacher that was trained on this order, or a loss on features",
        )


def check_checkpoint(
    path: str, saved: Sequence[str] | None, datasets: Sequence[str], advice: str
) -> None:
    """Check that a checkpoint was trained on the classes of these datasets, where both are known.

    Raises:
        ValueError: a class has different numbers, or one of them has fewer classes.
    """
    if datasets:
        other = f"dataset '{datasets[0]}'"
        check_same_classes(f"the checkpoint {path}", saved, other, classes_of(datasets), advice)
