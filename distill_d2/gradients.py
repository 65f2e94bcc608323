"""How strongly each term of a training step pulls on the student: its value misleads, its gradient tells."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.utils.events import EventStorage
from torch import nn

from .distiller import Distiller
from .distiller.phases import reaches_student
from .losses.kept_graph import kept_graph
from .moving_numbers import settle
from .quiet import quiet
from .random_state import unchanged_random_state


@dataclass(frozen=True)
class TermGradient:
    """One term of a step.

    Attributes:
        value: of the term, weighted as it is trained on.
        gradient: the norm of its gradient in the student's backbone, neck included; 0 where it does not
            reach it.
        loss: registered name of the distillation loss that it is a term of; "": the student's own.
    """

    value: float
    gradient: float
    loss: str = ""


@dataclass(frozen=True)
class TermGradients:
    """The terms of a step, by name.

    Attributes:
        iteration: the student's, whose schedule held.
        terms: in the order of the step.
        task: the norm of the gradient of all of the student's own terms together.
        losses: that of the terms of each distillation loss together, by its registered name.
    """

    iteration: int
    terms: Mapping[str, TermGradient]
    task: float
    losses: Mapping[str, float] = field(default_factory=dict)

    def ratio(self, loss: str) -> float | None:
        """The gradient of a distillation loss in units of the task's; None where there is none to compare with."""
        return self.losses[loss] / self.task if self.task > 0 else None


def term_gradients(
    model: nn.Module, *batches: Sequence[Mapping[str, Any]], iteration: int | None = None
) -> TermGradients:
    """The value of each term of a training step, and the norm of its gradient in the student's backbone: means
    over the batches of values and of gradients, as in a step on all of them.

    It leaves no trace: each step is one of a copy, and random numbers are as before. In float32. Moving averages
    that scale a detector's losses have settled, see ``settle``. Gradients are added on the host. The processes of
    a distributed run call it together, because some detectors average over them.

    Args:
        model: a detector, or a Distiller around one; not wrapped in DistributedDataParallel.
        batches: each as a dataset mapper gives it.
        iteration: of the student, for losses with a schedule; None: ``acting_iteration``.

    Raises:
        ValueError: there are no batches.
    """
    if not batches:
        raise ValueError("no batch to measure gradients on; expected at least one")
    if iteration is None:
        iteration = acting_iteration(model)
    teacher = model.teacher.lent() if isinstance(model, Distiller) else contextlib.nullcontext()
    total = _Total()
    with teacher, unchanged_random_state(), quiet(), torch.enable_grad():
        for batch in batches:
            copied = _copy_of(model)
            settle(copied.student if isinstance(copied, Distiller) else copied, batch)
            total.add(*_step(copied, batch, iteration))
    names = list(model.losses) if isinstance(model, Distiller) else []
    return total.mean(iteration, len(batches), names)


def acting_iteration(model: nn.Module) -> int:
    """The first iteration at which most distillation losses act on the student, as strongly as they ever do."""
    if not isinstance(model, Distiller):
        return 0
    losses = list(model.losses.values())

    def strength(iteration: int) -> tuple[int, float]:
        factors = [loss.factor(iteration) for loss in losses if reaches_student(loss, iteration)]
        return len(factors), sum(factors)

    return max(range(max(model.max_iter, 1)), key=strength)


def distills(model: Distiller) -> bool:
    """Whether some loss acts on the student in some iteration."""
    iterations = range(max(model.max_iter, 1))
    return any(reaches_student(loss, i) for loss in model.losses.values() for i in iterations)


def trained_backbone(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the student's backbone and neck that are trained.

    Args:
        model: a detector, or a Distiller around one.
    """
    student: Any = model.student if isinstance(model, Distiller) else model
    return [parameter for parameter in student.backbone.parameters() if parameter.requires_grad]


def gradients_in(loss: torch.Tensor, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    """The gradients of a scalar, whose graph stays; zeros where it does not reach a parameter."""
    if not loss.requires_grad or not parameters:
        return [torch.zeros_like(parameter) for parameter in parameters]
    with kept_graph():
        found = torch.autograd.grad(
            loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
    return list(found)


def norm_of(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The norm of all of them together: a scalar."""
    if not gradients:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


class _Total:
    """Sums over batches of values and, on the host, of gradients."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        self._gradients: dict[str, list[torch.Tensor]] = {}
        self._owners: dict[str, str] = {}

    def add(
        self, model: nn.Module, losses: Mapping[str, torch.Tensor], owners: Mapping[str, str]
    ) -> None:
        parameters = trained_backbone(model)
        for name, loss in losses.items():
            gradients = [gradient.cpu() for gradient in gradients_in(loss, parameters)]
            if name in self._gradients:
                gradients = [a + b for a, b in zip(self._gradients[name], gradients)]
            self._gradients[name] = gradients
            self._values[name] = self._values.get(name, 0.0) + loss.item()
            self._owners[name] = owners.get(name, "")

    def mean(self, iteration: int, count: int, names: Sequence[str]) -> TermGradients:
        """Of ``count`` batches; ``names`` are those of the distillation losses."""
        terms = {
            name: TermGradient(value / count, self._norm([name]) / count, self._owners[name])
            for name, value in self._values.items()
        }
        task = self._norm_of_owner("") / count
        return TermGradients(iteration, terms, task, {n: self._norm_of_owner(n) / count for n in names})

    def _norm_of_owner(self, owner: str) -> float:
        return self._norm([name for name, each in self._owners.items() if each == owner])

    def _norm(self, names: Sequence[str]) -> float:
        """Of the sum of these terms."""
        gradients = [sum(parts) for parts in zip(*(self._gradients[name] for name in names))]
        return norm_of(gradients).item()


def _copy_of(model: nn.Module) -> nn.Module:
    """A copy in training mode. It shares the teacher, whose only state is its preparation."""
    if not isinstance(model, Distiller):
        return copy.deepcopy(model).train()
    teacher = model.teacher
    copied = copy.deepcopy(model, {id(each): each for each in (teacher, teacher.view)}).train()
    copied.phases.supported_by_trainer = True
    return copied


def _step(
    model: nn.Module, batch: Sequence[Mapping[str, Any]], iteration: int
) -> tuple[nn.Module, dict[str, torch.Tensor], Mapping[str, str]]:
    """The model, the terms of a step, and the distillation loss that each one is of."""
    distiller = model if isinstance(model, Distiller) else None
    pretrained = distiller.phases.pretrain_iters if distiller else 0
    with EventStorage(iteration + pretrained):
        losses = model(batch)
    terms = {name: loss for name, loss in losses.items() if name != "loss_idle"}
    return model, terms, distiller.owners if distiller else {}
