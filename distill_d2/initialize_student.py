"""Start a student from its teacher, the "inheriting strategy" of ICD (NeurIPS 2021)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .freeze import matching_names, summary

logger = logging.getLogger(__name__)

State = Mapping[str, torch.Tensor]


@torch.no_grad()
def initialize_student(
    student: nn.Module,
    teacher: nn.Module,
    *,
    fpn: bool = False,
    head: bool = False,
    names: Sequence[str] = (),
) -> int:
    """Copy the teacher's FPN, heads, or tensors of matching names into the student, each into the tensor
    of equal name.

    The FPN is all of the backbone outside the bottom-up network (laterals, outputs, top block); the
    heads are everything outside the backbone. Tensors of another shape are skipped. What was copied,
    skipped and left as it was is logged.

    Args:
        names: regular expressions of names in the student's ``state_dict()``.

    Returns:
        the number of tensors copied.

    Raises:
        ValueError: nothing could be copied; a pattern is not a valid regular expression, or matches no name.
    """
    of_student, of_teacher = student.state_dict(), teacher.state_dict()
    matching = set(matching_names(list(of_student), names, "MODEL.DISTILLER.PRELOAD_NAMES"))
    chosen = [
        name
        for name in of_student
        if name in matching or (fpn and _in_fpn(name)) or (head and _in_head(name))
    ]
    fitting = [n for n in chosen if n in of_teacher and of_teacher[n].shape == of_student[n].shape]
    if not fitting:
        raise ValueError(
            "MODEL.DISTILLER.PRELOAD_FPN / PRELOAD_HEAD / PRELOAD_NAMES: no tensor of the teacher "
            f"({type(teacher).__name__}) fits the student ({type(student).__name__}); "
            "set the first two to False and the last to []"
        )
    for name in fitting:
        of_student[name].copy_(of_teacher[name])
    logger.info(
        f"Copied {len(fitting)} tensors of the teacher into the student: {summary(fitting)}."
        + _describe_skipped(chosen, of_student, of_teacher)
    )
    return len(fitting)


def _in_fpn(name: str) -> bool:
    return name.startswith("backbone.") and not name.startswith("backbone.bottom_up.")


def _in_head(name: str) -> bool:
    return not name.startswith("backbone.") and "pixel_" not in name


def _describe_skipped(chosen: Sequence[str], of_student: State, of_teacher: State) -> str:
    absent = [name for name in chosen if name not in of_teacher]
    mis_shaped = [
        f"  {name}: teacher {tuple(of_teacher[name].shape)}, student {tuple(of_student[name].shape)}"
        for name in chosen
        if name in of_teacher and of_teacher[name].shape != of_student[name].shape
    ]
    text = f"\nNot in the teacher, left as they were: {summary(absent)}." if absent else ""
    return text + ("\nSkipped, of another shape:\n" + "\n".join(mis_shaped) if mis_shaped else "")
