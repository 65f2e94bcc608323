"""How strongly each term of a training step pulls on the student: its value misleads, its gradient tells."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from detectron2.utils.events import EventStorage
from torch import nn

from .distiller import Distiller
from .distiller.phases import reaches_student
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
    model: nn.Module, batch: Sequence[Mapping[str, Any]], iteration: int | None = None
) -> TermGradients:
    """The value of each term of a training step, and the norm of its gradient in the student's backbone.

    It leaves no trace: the step is one of a copy, and random numbers are as before. In float32. The processes of
    a distributed run call it together, because some detectors average over them.

    Args:
        model: a detector, or a Distiller around one; not wrapped in DistributedDataParallel.
        batch: as a dataset mapper gives it.
        iteration: of the student, for losses with a schedule; None: ``acting_iteration``.
    """
    if iteration is None:
        iteration = acting_iteration(model)
    with _copy_of(model) as copied, unchanged_random_state(), quiet(), torch.enable_grad():
        losses, owners = _step(copied, batch, iteration)
        student: Any = copied.student if isinstance(copied, Distiller) else copied
        parameters = [p for p in student.backbone.parameters() if p.requires_grad]
        terms, sums = _measure(losses, owners, parameters)
    names = list(model.losses) if isinstance(model, Distiller) else []
    return TermGradients(iteration, terms, sums.get("", 0.0), {n: sums.get(n, 0.0) for n in names})


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


def mean_gradients(measured: Sequence[TermGradients]) -> TermGradients:
    """The means over several batches.

    Raises:
        ValueError: there are none.
    """
    first = measured[0]
    terms = {
        name: TermGradient(
            fmean(each.terms[name].value for each in measured),
            fmean(each.terms[name].gradient for each in measured),
            term.loss,
        )
        for name, term in first.terms.items()
    }
    losses = {name: fmean(each.losses[name] for each in measured) for name in first.losses}
    return TermGradients(first.iteration, terms, fmean(each.task for each in measured), losses)


@contextlib.contextmanager
def _copy_of(model: nn.Module) -> Iterator[nn.Module]:
    """A copy in training mode. It shares the teacher, whose only state is its preparation."""
    if not isinstance(model, Distiller):
        yield copy.deepcopy(model).train()
        return
    teacher = model.teacher
    with teacher.lent():
        copied = copy.deepcopy(model, {id(each): each for each in (teacher, teacher.view)}).train()
        copied.phases.supported_by_trainer = True
        yield copied


def _step(
    model: nn.Module, batch: Sequence[Mapping[str, Any]], iteration: int
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The terms of a step, and the distillation loss that each one is of."""
    owners: dict[str, str] = {}
    pretrained = 0
    if isinstance(model, Distiller):
        pretrained = model.phases.pretrain_iters
        for name, loss in model.losses.items():
            owners.update(dict.fromkeys(loss.idle(), name))
            loss.register_forward_hook(
                lambda _loss, _inputs, terms, name=name: owners.update(dict.fromkeys(terms, name))
            )
    with EventStorage(iteration + pretrained):
        losses = model(batch)
    return {name: loss for name, loss in losses.items() if name != "loss_idle"}, owners


def _measure(
    losses: Mapping[str, torch.Tensor], owners: Mapping[str, str], parameters: Sequence[nn.Parameter]
) -> tuple[dict[str, TermGradient], dict[str, float]]:
    """The terms, and the norms of the gradients of all terms of an owner together; "" owns the student's."""
    norms: dict[str, torch.Tensor] = {}
    sums: dict[str, list[torch.Tensor]] = {}
    for name, loss in losses.items():
        gradients, owner = _gradients(loss, parameters), owners.get(name, "")
        norms[name] = _norm(gradients)
        sums[owner] = [a + b for a, b in zip(sums[owner], gradients)] if owner in sums else gradients
    terms = {
        name: TermGradient(loss.item(), norms[name].item(), owners.get(name, ""))
        for name, loss in losses.items()
    }
    return terms, {owner: _norm(gradients).item() for owner, gradients in sums.items()}


def _gradients(loss: torch.Tensor, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    """Those of a term; zeros where it does not reach a parameter."""
    if not loss.requires_grad or not parameters:
        return [torch.zeros_like(parameter) for parameter in parameters]
    found = torch.autograd.grad(
        loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return list(found)


def _norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    if not gradients:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
