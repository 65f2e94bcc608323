"""What the losses of a Distiller read in a step, and losses on what was recorded."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Callable

import torch
from detectron2.structures import Boxes
from torch import nn

from ..distiller import Distiller
from ..losses import DistillLoss
from ..taps import Taps, map_tensors
from ..views import Batch, DetectorView, Predictions


@contextlib.contextmanager
def intercepted(loss: DistillLoss, function: Callable) -> Iterator[None]:
    """Inside, ``function(forward, student, teacher, batch)`` is called in place of the loss's ``forward``,
    which it gets as its first argument; it returns the terms."""
    loss.forward = functools.partial(function, loss.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del loss.forward  # the class's is back


@dataclass
class Records:
    """What the losses read in one step.

    Attributes:
        student: outputs of the student by module path.
        teacher: outputs of the teacher by module path.
        batch: the batch of the step.
        leaves: the student's recorded tensors; they take gradients.
        proposals: the student's proposals, which the teacher's box head scored.
        box_head: its predictions for them.
        own_proposals: the teacher's own proposals and their classes.
        own_box_head: the teacher's predictions for them.
    """

    student: dict[str, Any] = field(default_factory=dict)
    teacher: dict[str, Any] = field(default_factory=dict)
    batch: Batch | None = None
    leaves: list[torch.Tensor] = field(default_factory=list)
    proposals: list[Boxes] | None = None
    box_head: Predictions | None = None
    own_proposals: tuple[list[Boxes], list[torch.Tensor]] | None = None
    own_box_head: Predictions | None = None

    def start(self, _loss: nn.Module, inputs: tuple[DetectorView, DetectorView, Batch]) -> tuple:
        """A forward pre-hook of a loss: it is given a teacher whose answers are noted."""
        student, teacher, batch = inputs
        return student, _NotedTeacher(teacher, self), batch

    def take(self, _loss: nn.Module, inputs: tuple[Any, Any, Batch], _terms: Any) -> None:
        """A forward hook of a loss."""
        student, teacher, self.batch = inputs
        self.student.update(outputs_of(student.taps))
        self.teacher.update(outputs_of(teacher.taps))

    def detach(self) -> None:
        """Cut the outputs off the networks; the student's become leaves that take a gradient."""
        self.teacher = map_tensors(torch.Tensor.detach, self.teacher)
        self.student = map_tensors(self._leaf, self.student)

    def are_own(self, proposals: list[Boxes]) -> bool:
        """Whether these are the teacher's own proposals."""
        return self.own_proposals is not None and proposals is self.own_proposals[0]

    def _leaf(self, tensor: torch.Tensor) -> torch.Tensor:
        leaf = tensor.detach().requires_grad_(tensor.is_floating_point())
        self.leaves.append(leaf)
        return leaf


class _TeacherView:
    """A teacher's view, but for the questions to its two-stage head."""

    def __init__(self, view: DetectorView, records: Records):
        self._view, self._records = view, records

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view, name)


class _NotedTeacher(_TeacherView):
    """Notes what the teacher's two-stage head is asked, and its answers."""

    def box_head(self, proposals: list[Boxes]) -> Predictions:
        predictions, records = self._view.box_head(proposals), self._records
        if records.are_own(proposals):
            records.own_box_head = predictions
        else:
            records.proposals, records.box_head = proposals, predictions
        return predictions

    def own_proposals(self, batch: Batch) -> tuple[list[Boxes], list[torch.Tensor]]:
        self._records.own_proposals = self._view.own_proposals(batch)
        return self._records.own_proposals


class _RecordedTeacher(_TeacherView):
    """Answers from the records: its two-stage head is not run, which is not the work of a loss."""

    def box_head(self, proposals: list[Boxes]) -> Predictions | None:
        records = self._records
        return records.own_box_head if records.are_own(proposals) else records.box_head

    def own_proposals(self, _batch: Batch) -> tuple[list[Boxes], list[torch.Tensor]] | None:
        return self._records.own_proposals


def outputs_of(taps: Taps) -> dict[str, Any]:
    return {path: taps.output(path) for path in taps.recorded}


def record(distiller: Distiller, run_step: Callable[[], Any]) -> Records:
    """Run a distilled step and keep what the losses read in it."""
    records = Records()
    handles = [
        handle
        for loss in distiller.losses.values()
        for handle in (
            loss.register_forward_pre_hook(records.start),
            loss.register_forward_hook(records.take),
        )
    ]
    try:
        run_step()
    finally:
        for handle in handles:
            handle.remove()
    records.detach()
    return records


class Replay:
    """Calls functions on the recorded outputs, as a step of the Distiller would."""

    def __init__(self, distiller: Distiller, records: Records):
        self.student, self.teacher = distiller.student_view, distiller.teacher.view
        self.records = records

    def __call__(self, compute: Callable) -> Any:
        """What ``compute(student, teacher, batch)`` returns, see DistillLoss.forward."""
        teacher = _RecordedTeacher(self.teacher, self.records)
        with self.student.recording(), self.teacher.recording():
            put_outputs(self.student.taps, self.records.student)
            put_outputs(self.teacher.taps, self.records.teacher)
            return compute(self.student, teacher, self.records.batch)


def put_outputs(taps: Taps, outputs: dict[str, Any]) -> None:
    for path, output in outputs.items():
        taps.put(path, output)
