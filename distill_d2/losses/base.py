"""What every distillation loss has: a name, a config node, a schedule, and a forward."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from detectron2.config import CfgNode as CN
from detectron2.utils.registry import Registry
from torch import nn

from ..views import Batch, DetectorView
from .pairing import FeaturePairs

DISTILL_LOSS_REGISTRY = Registry("DISTILL_LOSS")
DISTILL_LOSS_REGISTRY.__doc__ = """Subclasses of DistillLoss, chosen by MODEL.DISTILLER.TYPES."""


class DistillLoss(nn.Module):
    """A loss between what a student and a teacher computed on the same batch.

    A subclass sets ``NODE``, takes keyword arguments with defaults (they are the keys of its config
    node, in upper case), and implements ``forward``. Its FeaturePairs are bound to the detectors
    before training; a loss that needs more (a head, a tap) states it in ``bind``. One without
    FeaturePairs that does not override ``bind`` may read all levels of both necks.

        @DISTILL_LOSS_REGISTRY.register()
        class MeanFeature(DistillLoss):
            NODE = "MEAN_FEATURE"

            def __init__(self, *, in_features=("p3", "p4"), weight=2.0, **schedule):
                super().__init__(weight=weight, **schedule)
                self.pairs = FeaturePairs(in_features)

            def forward(self, student, teacher, batch):
                pairs = self.pairs(student, teacher).values()
                return {"loss_mean_feature": sum((s.mean() - t.mean()) ** 2 for s, t in pairs)}
    """

    #: Name of the config node below MODEL.DISTILLER.
    NODE: str = ""

    #: Factors of the student's own losses, by name, while this loss is on; a loss that changes them
    #: sets it in ``bind``.
    task_weights: Mapping[str, float] = MappingProxyType({})

    def __init__(
        self,
        *,
        weight: float = 1.0,
        start_iter: int = 0,
        stop_iter: int = -1,
        warmup_iters: int = 0,
    ):
        """
        Args:
            weight: multiplies all terms of this loss.
            start_iter: first iteration (from 0) with this loss.
            stop_iter: first iteration without it; -1: never.
            warmup_iters: the weight grows linearly over this many iterations from start_iter.

        Raises:
            ValueError: weight or warmup_iters is negative, or the loss stops before it starts.
        """
        super().__init__()
        if weight < 0 or warmup_iters < 0 or 0 <= stop_iter <= start_iter:
            raise ValueError(
                f"MODEL.DISTILLER.{self.NODE}: expected WEIGHT >= 0, WARMUP_ITERS >= 0 and "
                f"STOP_ITER -1 or above START_ITER; got WEIGHT {weight}, WARMUP_ITERS "
                f"{warmup_iters}, START_ITER {start_iter}, STOP_ITER {stop_iter}"
            )
        self.weight = weight
        self.start_iter = start_iter
        self.stop_iter = stop_iter
        self.warmup_iters = warmup_iters

    def bind(self, student: DetectorView, teacher: DetectorView) -> None:
        """State what this loss reads of both detectors, and create its adapters. Called once.

        Raises:
            KeyError, TypeError, ValueError: a detector cannot give what the loss needs.
        """
        all_pairs = self.feature_pairs()
        for pairs in all_pairs:
            pairs.bind(student, teacher)
        if not all_pairs:
            student.require_neck()
            teacher.require_neck()

    def feature_pairs(self) -> list[FeaturePairs]:
        """The level pairings of this loss, for binding and for the table at start-up."""
        return [module for module in self.modules() if isinstance(module, FeaturePairs)]

    def forward(
        self, student: DetectorView, teacher: DetectorView, batch: Batch
    ) -> dict[str, torch.Tensor]:
        """The unweighted terms, scalars in float32 by name; differentiable w.r.t. the student."""
        raise NotImplementedError(f"{type(self).__name__}.forward")

    def factor(self, iteration: int) -> float:
        """Weight times schedule at this iteration; 0 where the loss is off."""
        if iteration < self.start_iter or 0 <= self.stop_iter <= iteration:
            return 0.0
        if iteration < self.start_iter + self.warmup_iters:
            return self.weight * (iteration - self.start_iter + 1) / (self.warmup_iters + 1)
        return self.weight

    def idle(self) -> dict[str, torch.Tensor]:
        """A zero that reaches every parameter of this loss, so that DDP sees all of them each step."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        if not parameters:
            return {}
        return {f"loss_{self.NODE.lower()}": sum(p.sum() for p in parameters) * 0.0}

    @classmethod
    def add_config(cls, distiller: CN) -> None:
        """Add this loss's node, with its defaults, to the node MODEL.DISTILLER."""
        distiller[cls.NODE] = CN({key.upper(): value for key, value in keyword_defaults(cls).items()})

    @classmethod
    def from_config(cls, distiller: CN) -> DistillLoss:
        """Build this loss from its node in MODEL.DISTILLER."""
        return cls(**{key.lower(): value for key, value in distiller[cls.NODE].items()})


def check_setting(node: str, name: str, value: Any, holds: bool, expected: str) -> None:
    """Check an argument of a loss.

    Args:
        node: NODE of the loss; name: of the argument.

    Raises:
        ValueError: it does not hold; the message names the key.
    """
    if holds:
        return
    raise ValueError(f"MODEL.DISTILLER.{node}.{name.upper()} is {value!r}; expected {expected}")


def check_choices(node: str, **choices: tuple[Any, Iterable[Any]]) -> None:
    """Check arguments of the loss of this node, by name, that are one of some values: (value, values).

    Raises:
        ValueError: one is not; the message names the key.
    """
    for name, (value, known) in choices.items():
        check_setting(node, name, value, value in known, f"one of {list(known)}")


def check_not_negative(node: str, **values: float) -> None:
    """Check arguments of the loss of this node, by name, that are finite numbers from 0.

    Raises:
        ValueError: one is not; the message names the key.
    """
    for name, value in values.items():
        check_setting(node, name, value, 0 <= value < math.inf, "a finite number, 0 or more")


def check_odd(node: str, **values: int) -> None:
    """Check arguments of the loss of this node, by name, that are sides of a convolution's kernel.

    Raises:
        ValueError: one is not; the message names the key.
    """
    for name, value in values.items():
        check_setting(node, name, value, value > 0 and value % 2 == 1, "an odd number above 0")


def build_losses(distiller: CN) -> dict[str, DistillLoss]:
    """The losses that MODEL.DISTILLER.TYPES names, by registered name.

    Raises:
        ValueError: TYPES is empty, repeats a name, or names a loss that is not registered.
    """
    names, known = list(distiller.TYPES), sorted(name for name, _ in DISTILL_LOSS_REGISTRY)
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) < len(names):
        raise ValueError(
            f"MODEL.DISTILLER.TYPES is {names}; expected one or more different names "
            f"of {known}" + (f"; unknown: {unknown}" if unknown else "")
        )
    return {name: DISTILL_LOSS_REGISTRY.get(name).from_config(distiller) for name in names}


def keyword_defaults(cls: type) -> dict[str, Any]:
    """The keyword arguments of ``cls`` and its base losses with their defaults, base first."""
    defaults: dict[str, Any] = {}
    for ancestor in reversed(cls.__mro__):
        if not issubclass(ancestor, DistillLoss):
            continue
        for name, parameter in inspect.signature(ancestor.__init__).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                value = parameter.default
                defaults[name] = list(value) if isinstance(value, tuple) else value
    return defaults
