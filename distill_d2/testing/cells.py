"""A loss and a kind of detector, and training steps of the two."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from detectron2.utils.events import EventStorage
from torch import nn

from distill_d2 import Distiller, DistillLoss, Teacher

from .family import Family
from .recipes import Recipe

#: Scalar tensors by name, or those of a state.
Terms = dict[str, Any]


@dataclass(frozen=True)
class FirstStep:
    """A step of a new Distiller on two images with objects.

    Attributes:
        model: the Distiller; its parameters have the gradients of all losses.
        losses: of the step, by name.
        own: names of those that are the student's own.
        reaches_student: whether a gradient of the loss's terms at a parameter of the student is not 0.
        calls: how often parts of the teacher ran, by their names in it.
        teacher: copies of the tensors of the teacher's state before the step.
    """

    model: Distiller
    losses: Terms
    own: set[str]
    reaches_student: bool
    calls: Mapping[str, int]
    teacher: Terms

    @property
    def terms(self) -> Terms:
        """The loss's terms."""
        return {name: loss for name, loss in self.losses.items() if name not in self.own}


@dataclass(frozen=True)
class Step:
    """A Distiller's step.

    Attributes:
        model: the Distiller.
        losses: of the step, by name.
        gradients: of the parameters that are trained, by name, also after later steps of the model.
    """

    model: Distiller
    losses: Terms
    gradients: Mapping[str, torch.Tensor | None]


class Detectors:
    """The student and the teacher of all cells of one kind of detector."""

    def __init__(self, family: Family, device: str):
        self._family, self._device = family, device
        torch.manual_seed(0)
        self._student, self._teacher = family.build(8), family.build(16)

    @staticmethod
    @functools.cache
    def of(family: Family, device: str) -> Detectors:
        """The same at each call."""
        return Detectors(family, device)

    def student(self) -> nn.Module:
        """A new student, in training mode; the same at each call."""
        return copy.deepcopy(self._student).to(self._device).train()

    def teacher(self) -> nn.Module:
        """A new teacher; the same at each call."""
        return copy.deepcopy(self._teacher)

    @cached_property
    def alone(self) -> tuple[nn.Module, Terms]:
        """A student after a step without distillation, and its losses."""
        student = self.student()
        return student, step(student, self._family.batch())


class Cell:
    """A loss and a kind of detector.

    Attributes:
        family: the kind of detector.
        refusal: why the Distiller refuses the two; "" where it does not.
    """

    def __init__(
        self,
        family: Family,
        loss: DistillLoss,
        *,
        equal: DistillLoss | None = None,
        not_zero: Sequence[str] = (),
        host: Sequence[str] = (),
        device: str = "cpu",
    ):
        """
        Args:
            loss: not yet used with a Distiller.
            equal: a loss that is 0 where student and teacher are equal; None: ``loss``.
            not_zero, host: see Recipe.
            device: where the steps are computed.
        """
        self.family = family
        self.not_zero = tuple(not_zero)
        self.host = tuple(host)
        self.device = device
        self._loss = loss
        self._equal = equal or loss
        self._detectors = Detectors.of(family, device)
        self.refusal = ""
        try:
            self._new = self.distiller()
        except (KeyError, TypeError, ValueError) as error:
            self.refusal = str(error.args[0])

    @classmethod
    def of_recipe(cls, recipe: Recipe, family: Family, device: str = "cpu") -> Cell:
        """The recipe's loss."""
        return cls(
            family,
            recipe.build(family),
            equal=recipe.build(family, equal=True) if recipe.equal else None,
            not_zero=recipe.not_zero,
            host=recipe.host,
            device=device,
        )

    def student(self) -> nn.Module:
        """A new student, in training mode; the same at each call."""
        return self._detectors.student()

    def distiller(self, **options: float) -> Distiller:
        """A new Distiller, in training mode; the same at each call.

        Args:
            options: of Distiller.
        """
        teacher = Teacher(self._detectors.teacher())
        return self._distiller(self.student(), teacher, self._loss, **options)

    def distiller_of_equals(self) -> Distiller:
        """One whose student and teacher compute the same: they have the same weights, and batch norms and
        dropout are in evaluation mode in both."""
        student = self.student()
        teacher = Teacher(copy.deepcopy(student), prepare=False)
        model = self._distiller(student, teacher, self._equal)
        for module in student.modules():
            if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)):
                module.eval()
        return model

    def _distiller(self, student: nn.Module, teacher: Teacher, loss: DistillLoss, **options):
        torch.manual_seed(0)
        losses = [copy.deepcopy(loss)]
        model = Distiller(student=student, teacher=teacher, losses=losses, max_iter=2, **options)
        return model.to(self.device).train()

    @property
    def alone(self) -> tuple[nn.Module, Terms]:
        """A student after a step without distillation, and its losses."""
        return self._detectors.alone

    @cached_property
    def first(self) -> FirstStep:
        """A step that several laws look at."""
        model, own = self._new, set(self.alone[1])
        teacher = model.teacher.model
        before = {name: value.clone() for name, value in teacher.state_dict().items()}
        with counting(parts_of(teacher)) as calls:
            losses = losses_of(model, self.family.batch())
        terms = [loss for name, loss in losses.items() if name not in own]
        if any(term.requires_grad for term in terms):
            sum(terms).backward(retain_graph=True)
        gradients = [p.grad for p in model.student.parameters() if p.grad is not None]
        reached = any(bool(gradient.any()) for gradient in gradients)
        sum(losses[name] for name in own).backward()
        losses = {name: loss.detach() for name, loss in losses.items()}
        return FirstStep(model, losses, own, reached, calls, before)

    @cached_property
    def without_task(self) -> Step:
        """A new Distiller's step with TASK_LOSS_WEIGHT 0 and twice the weight, which several laws look at."""
        model = self.distiller(task_loss_weight=0.0)
        (loss,) = model.losses.values()
        loss.applied_weight *= 2
        losses = step(model, self.family.batch())
        return Step(model, losses, gradients_of(model))

    @cached_property
    def without_objects(self) -> Step:
        """A new Distiller's step on images without objects, which several laws look at."""
        model = self.distiller()
        losses = step(model, self.family.batch(objects=0))
        return Step(model, losses, gradients_of(model))


def step(model: nn.Module, batch: list[dict]) -> Terms:
    """The losses of a training step; afterwards the parameters have their gradients."""
    model.zero_grad()
    losses = losses_of(model, batch)
    total: Any = sum(losses.values())
    total.backward()
    return {name: loss.detach() for name, loss in losses.items()}


def losses_of(model: nn.Module, batch: list[dict]) -> Terms:
    """The losses of a training step, without the backward pass."""
    torch.manual_seed(1)
    with EventStorage(0):
        return model(batch)


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor | None]:
    """Those of the parameters that are trained, by name."""
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def parts_of(model: nn.Module) -> dict[str, nn.Module]:
    """A detector's modules, but for those inside of its backbone and those that have no parameters."""
    return {
        name: module
        for name, module in model.named_modules()
        if name and not name.startswith("backbone.") and any(True for _ in module.parameters())
    }


@contextlib.contextmanager
def counting(modules: dict[str, nn.Module]) -> Iterator[Counter]:
    """How often each of the modules runs inside, by its name."""
    calls: Counter[str] = Counter()

    def counter(name):
        return lambda *_: calls.update([name])

    handles = [module.register_forward_pre_hook(counter(name)) for name, module in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
