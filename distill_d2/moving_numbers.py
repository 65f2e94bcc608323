"""Numbers that a detector changes in training and that its state_dict lacks, such as RetinaNet's moving average of
positive anchors, by which it divides its losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from detectron2.utils.events import EventStorage
from torch import nn

from .random_state import unchanged_random_state
from .views import view_type


def numbers_of(student: nn.Module) -> dict[str, float]:
    """The values of the ``training_state`` that the detector's view names, as far as it has them."""
    return {
        name: float(getattr(owner, attribute))
        for name, owner, attribute in _places(student)
        if hasattr(owner, attribute)
    }


def set_numbers(student: nn.Module, numbers: Mapping[str, float]) -> None:
    """Restore what ``numbers_of`` gave."""
    for name, owner, attribute in _places(student):
        if name not in numbers:
            continue
        value = getattr(owner, attribute, None)
        if isinstance(value, torch.Tensor):
            value.fill_(numbers[name])
        else:
            setattr(owner, attribute, numbers[name])


def settle(student: nn.Module, batch: Sequence[Mapping[str, Any]]) -> None:
    """Let moving averages arrive where training on this batch alone would bring them.

    A new detector's are guesses (RetinaNet's is 100 positives), so that its losses would grow with the size of the
    batch. The gradients of its first steps say nothing about later ones, then.

    Args:
        student: in training mode.
        batch: as a dataset mapper gives it.
    """
    passes: list[dict[str, float]] = []
    with torch.no_grad(), EventStorage(), unchanged_random_state():
        while len(passes) < 3:
            student(batch)
            passes.append(numbers_of(student))
            if not passes[0]:
                return
    first, second, third = passes
    set_numbers(student, {name: _limit(first[name], second[name], third[name]) for name in first})


def _limit(first: float, second: float, third: float) -> float:
    """Of a moving average of equal numbers, from three of its values: each is a fixed part nearer."""
    before, after = second - first, third - second
    if before == 0 or after == before:
        return third
    return first + before / (1 - after / before)


def _places(student: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The dotted name of each number, the module that holds it, and its name there."""
    modules = dict(student.named_modules())
    for name in view_type(student).training_state:
        path, _, attribute = name.rpartition(".")
        if path in modules:
            yield name, modules[path], attribute
