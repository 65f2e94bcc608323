"""What is trained when: losses alone before iteration 0, parts of the student from some iteration on.

All that trained losses (TrainedLoss) ask of the Distiller and of its trainer goes through here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..losses import DistillLoss, TrainedLoss
from ..views import Batch, DetectorView

logger = logging.getLogger(__name__)


class TrainingPhases:
    """The training phases of MODEL.DISTILLER: PRETRAIN_TEACHER_ITERS, FIX_BACKBONE_BEFORE, FIX_HEAD_BEFORE.

    Attributes:
        pretrain_iters: steps before iteration 0, which train losses alone.
        supported_by_trainer: set by a trainer that runs ``pretrain_iters`` more steps, drops the
            gradients of ``frozen_parameters``, and builds the optimizers that losses ask for.
    """

    def __init__(
        self,
        student: nn.Module,
        losses: Mapping[str, DistillLoss],
        *,
        pretrain_iters: int = 0,
        fix_backbone_before: int = 0,
        fix_head_before: int = 0,
    ):
        """
        Args:
            student, losses: those of the Distiller.
            fix_backbone_before: the student's backbone is not trained before this iteration.
            fix_head_before: the rest of the student is not trained before this iteration.

        Raises:
            ValueError: a number of iterations is negative, or no loss can be pretrained.
        """
        self.pretrain_iters = pretrain_iters
        self.fix_backbone_before = fix_backbone_before
        self.fix_head_before = fix_head_before
        self.supported_by_trainer = False
        self._student: Any = student  # Module's annotations know none of a detector's attributes
        self._losses = losses
        negative = {key: value for key, value in self._settings().items() if value < 0}
        if negative:
            raise ValueError(f"{negative}: expected numbers of iterations, 0 or more")
        if pretrain_iters and not self._trained_losses():
            raise ValueError(
                f"{self._pretrain_setting()}, but none of the losses {list(losses)} can be "
                "pretrained; set it to 0, or add one that can to MODEL.DISTILLER.TYPES"
            )

    def check_trainer(self, first_step: bool) -> None:
        """Warn in the first step of a trainer without support of losses' own optimizers.

        Raises:
            RuntimeError: a phase is set, and the trainer does not support phases.
        """
        if self.supported_by_trainer:
            return
        settings: dict[str, float] = {key: value for key, value in self._settings().items() if value}
        settings.update(gradient_ratios(self._losses))
        if settings:
            raise RuntimeError(
                f"{settings}: this trainer does not support these keys. Train with "
                "distill_d2.engine.DistillTrainer (train_distill.py), or set them to 0"
            )
        own = [name for name, loss in self._trained_losses().items() if loss.solver is not None]
        if own and first_step:
            logger.warning(
                f"This trainer's one optimizer also trains the parameters of {own}; "
                "MODEL.DISTILLER.SOLVER is not used"
            )

    def pretrain(self, teacher: DetectorView, batch: Batch) -> dict[str, torch.Tensor]:
        """The terms of all losses that can be pretrained, scalars by name.

        Raises:
            ValueError: there are none.
        """
        terms: dict[str, torch.Tensor] = {}
        for name, loss in self._trained_losses().items():
            add_terms(terms, loss.pretrain(teacher, batch), name)
        if not terms:
            raise ValueError(f"{self._pretrain_setting()}, but no loss returned a term to pretrain with")
        return terms

    def frozen_parameters(self, iteration: int) -> list[nn.Parameter]:
        """Parameters that do not change in this step; the trainer drops their gradients.

        Args:
            iteration: the student's, below 0 while losses are pretrained.
        """
        trained = self._trained_losses()
        frozen = [p for loss in trained.values() for p in loss.frozen_parameters(iteration)]
        if iteration < 0:
            idle = [loss for name, loss in self._losses.items() if name not in trained]
            return [
                *frozen,
                *self._student.parameters(),
                *(p for loss in idle for p in loss.parameters()),
            ]
        backbone = list(self._student.backbone.parameters())
        if iteration < self.fix_backbone_before:
            frozen += backbone
        if iteration < self.fix_head_before:
            inside = set(backbone)
            frozen += [p for p in self._student.parameters() if p not in inside]
        return frozen

    def _trained_losses(self) -> dict[str, TrainedLoss]:
        return {name: loss for name, loss in self._losses.items() if isinstance(loss, TrainedLoss)}

    def _settings(self) -> dict[str, int]:
        return {
            "MODEL.DISTILLER.PRETRAIN_TEACHER_ITERS": self.pretrain_iters,
            "MODEL.DISTILLER.FIX_BACKBONE_BEFORE": self.fix_backbone_before,
            "MODEL.DISTILLER.FIX_HEAD_BEFORE": self.fix_head_before,
        }

    def _pretrain_setting(self) -> str:
        return f"MODEL.DISTILLER.PRETRAIN_TEACHER_ITERS is {self.pretrain_iters}"


def gradient_ratios(losses: Mapping[str, DistillLoss]) -> dict[str, float]:
    """The settings GRADIENT_RATIO that are not 0, by config key."""
    ratios = {
        loss.config_key("gradient_ratio"): loss.settings.gradient_ratio for loss in losses.values()
    }
    return {key: ratio for key, ratio in ratios.items() if ratio}


def measured_weights(losses: Mapping[str, DistillLoss]) -> list[str]:
    """The config keys of the weights that GRADIENT_RATIO sets."""
    return [
        loss.config_key(loss.weight_setting) for loss in losses.values() if loss.settings.gradient_ratio
    ]


def reaches_student(loss: DistillLoss, iteration: int) -> bool:
    """Whether gradients of this loss reach the student at this iteration."""
    if loss.factor(iteration) == 0:
        return False
    return not isinstance(loss, TrainedLoss) or loss.reaches_student(iteration)


def check_terms(terms: Any, loss: DistillLoss) -> None:
    """Check what the ``forward`` of a loss returned; the log tells if no term has a gradient.

    Raises:
        TypeError: it is no dict of scalar tensors by name.
    """
    name = f"{type(loss).__name__}.forward"
    if not isinstance(terms, dict) or not all(
        isinstance(term, torch.Tensor) and term.dim() == 0 for term in terms.values()
    ):
        found = terms if isinstance(terms, dict) else {type(terms).__name__: terms}
        shapes = {
            key: tuple(getattr(term, "shape", [type(term).__name__])) for key, term in found.items()
        }
        raise TypeError(f"{name} returned {shapes}; expected a dict of scalar tensors by name")
    if torch.is_grad_enabled() and not any(term.requires_grad for term in terms.values()):
        logger.warning(
            f"{name} returned the terms {list(terms)}, none with a gradient: the student does not learn from them"
        )


def add_terms(losses: dict[str, torch.Tensor], terms: dict[str, torch.Tensor], name: str) -> None:
    """Add the terms of the loss ``name``.

    Raises:
        ValueError: a term of that name exists already.
    """
    repeated = sorted(set(losses) & set(terms))
    if repeated:
        raise ValueError(f"the loss {name} returns terms {repeated}, which exist already")
    losses.update(terms)
