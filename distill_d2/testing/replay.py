"""Steps of a Distiller: one step, what its losses are given in it, and losses on what was recorded."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Callable

import torch
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torch import nn

from ..distiller import Distiller
from ..losses import DistillLoss
from ..taps import Taps, map_tensors
from ..views import Batch, DetectorView, Predictions


def step(
    distiller: Distiller, batch: list[dict[str, Any]], iteration: int = 0
) -> dict[str, torch.Tensor]:
    """One training step without an optimizer: the losses by name, after their backward."""
    with EventStorage(iteration):
        losses = distiller(batch)
    sum(losses.values()).backward()
    return losses


@contextlib.contextmanager
def intercepted(loss: DistillLoss, function: Callable) -> Iterator[None]:
    """Inside, ``function(forward, student, teacher, batch)`` is called in place of the loss's ``forward``,
    which it gets as its first argument; it returns the terms."""
    loss.forward = functools.partial(function, loss.forward)
    try:
        yield
    finally:
        del loss.forward  # the class's is back


@dataclass
class Records:
    """What the losses read in one step.

    Attributes:
        student, teacher: outputs by module path, cut off the networks; the student's are ``leaves`` that
            take a gradient.
        batch: the ground truth.
        proposals, box_head: the proposals that the teacher's box head scored, and its predictions.
        own_proposals, own_box_head: the teacher's own proposals, and its predictions for them.
    """

    student: dict[str, Any] = field(default_factory=dict)
    teacher: dict[str, Any] = field(default_factory=dict)
    batch: Batch | None = None
    leaves: list[torch.Tensor] = field(default_factory=list)
    proposals: list[Boxes] | None = None
    box_head: Predictions | None = None
    own_proposals: tuple[list[Boxes], list[torch.Tensor]] | None = None
    own_box_head: Predictions | None = None

    def take(self, _loss: nn.Module, inputs: tuple[Any, Any, Batch], _terms: Any) -> None:
        """A forward hook for a loss."""
        student, teacher, self.batch = inputs
        self.student.update(_outputs(student.taps))
        self.teacher.update(_outputs(teacher.taps))

    @contextlib.contextmanager
    def listening(self, teacher: DetectorView) -> Iterator[None]:
        """Inside, note the calls of the teacher's two-stage heads and their results."""
        box_head, own_proposals = teacher.box_head, teacher.own_proposals

        def note_box_head(proposals: list[Boxes]) -> Predictions:
            found = box_head(proposals)
            if self._is_own(proposals):
                self.own_box_head = found
            else:
                self.proposals, self.box_head = proposals, found
            return found

        def note_own_proposals(batch: Batch) -> tuple[list[Boxes], list[torch.Tensor]]:
            self.own_proposals = own_proposals(batch)
            return self.own_proposals

        teacher.box_head, teacher.own_proposals = note_box_head, note_own_proposals
        try:
            yield
        finally:
            del teacher.box_head, teacher.own_proposals  # the view's methods are back

    @contextlib.contextmanager
    def answering(self, teacher: DetectorView) -> Iterator[None]:
        """Inside, the teacher's two-stage heads return what was noted, and do not run."""
        teacher.box_head = lambda boxes: self.own_box_head if self._is_own(boxes) else self.box_head
        teacher.own_proposals = lambda _batch: self.own_proposals
        try:
            yield
        finally:
            del teacher.box_head, teacher.own_proposals

    def _is_own(self, proposals: list[Boxes]) -> bool:
        return self.own_proposals is not None and proposals is self.own_proposals[0]

    def detach(self) -> None:
        """Cut the outputs off the networks; the student's become leaves."""
        self.teacher = map_tensors(torch.Tensor.detach, self.teacher)
        self.student = map_tensors(self._leaf, self.student)

    def _leaf(self, tensor: torch.Tensor) -> torch.Tensor:
        leaf = tensor.detach().requires_grad_(tensor.is_floating_point())
        self.leaves.append(leaf)
        return leaf


def record(distiller: Distiller, run_step: Callable[[], Any]) -> Records:
    """What the losses of a distiller read in one step, which ``run_step`` makes."""
    records = Records()
    handles = [loss.register_forward_hook(records.take) for loss in distiller.losses.values()]
    try:
        with records.listening(distiller.teacher.view):
            run_step()
    finally:
        for handle in handles:
            handle.remove()
    records.detach()
    return records


class Replay:
    """Calls functions on recorded outputs, as a step of the Distiller calls its losses."""

    def __init__(self, distiller: Distiller, records: Records):
        self.student, self.teacher = distiller.student_view, distiller.teacher.view
        self.records = records

    def __call__(self, compute: Callable) -> Any:
        """What ``compute(student, teacher, batch)`` returns, see DistillLoss.forward."""
        with self.student.recording(), self.teacher.recording(), self.records.answering(self.teacher):
            for view, outputs in (
                (self.student, self.records.student),
                (self.teacher, self.records.teacher),
            ):
                for path, output in outputs.items():
                    view.taps.put(path, output)
            return compute(self.student, self.teacher, self.records.batch)


def _outputs(taps: Taps) -> dict[str, Any]:
    return {path: taps.output(path) for path in taps.recorded}
