"""Training of losses that have parameters, an optimizer and training steps of their own."""

from __future__ import annotations

import logging
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils.events import EventWriter, get_event_storage
from torch import nn
from torch.optim import Optimizer

from ..distiller import Distiller
from .settings import RunSettings
from .solvers import LossSolver, build_solvers

logger = logging.getLogger(__name__)


class LossTraining:
    """Pretraining, own optimizers and frozen parameters of a Distiller's losses, for its trainer.

    Attributes:
        pretrain_iters: iterations before the student's first, in which only losses are trained.
        solvers: the LossSolver of each loss that has one, by the loss's name.
    """

    def __init__(self, model: nn.Module, settings: RunSettings):
        """
        Raises:
            KeyError, ValueError: MODEL.DISTILLER.SOLVER has an unknown key or value.
        """
        self.pretrain_iters = 0
        self.solvers: dict[str, LossSolver] = {}
        self._distiller = model if isinstance(model, Distiller) else None
        if self._distiller is not None:
            self._distiller.phases.supported_by_trainer = True
            self.pretrain_iters = self._distiller.phases.pretrain_iters
            self.solvers = build_solvers(self._distiller.losses, settings.max_iter, settings.steps)

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        return {name: solver.optimizer for name, solver in self.solvers.items()}

    def frozen_parameters(self) -> list[nn.Parameter]:
        """Parameters that the current step must not change."""
        if self._distiller is None:
            return []
        return self._distiller.phases.frozen_parameters(self._distiller.iteration)

    def hooks(self) -> list[HookBase]:
        return [SolverSchedules(self)] if self.solvers else []

    def writers(self) -> list[EventWriter]:
        return [GradientPrinter(list(self.solvers))] if self.solvers else []

    def state_dict(self) -> dict[str, Any]:
        """Entries of the trainer's own state."""
        return {
            "pretrain_iters": self.pretrain_iters,
            "solvers": {name: solver.state_dict() for name, solver in self.solvers.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError if a solver's state is of another optimizer; see also ``check``."""
        for name, solver in self.solvers.items():
            solver.load_state_dict(state_dict["solvers"][name])

    def check(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError if the state is of other solvers, or of another length of pretraining."""
        saved, expected = sorted(state_dict.get("solvers", {})), sorted(self.solvers)
        if saved != expected:
            raise ValueError(
                f"--resume: the checkpoint has optimizers of the losses {saved}, this run has them of "
                f"{expected}. Use the checkpoint's losses, another OUTPUT_DIR, or start without --resume"
            )
        pretrained = state_dict.get("pretrain_iters", 0)
        if pretrained != self.pretrain_iters:
            raise ValueError(
                f"--resume: MODEL.DISTILLER.PRETRAIN_TEACHER_ITERS is {self.pretrain_iters}, but the "
                f"checkpoint's run has {pretrained}; iterations are counted from there"
            )


class SolverSchedules(HookBase):
    """Logs and advances the learning rates of solvers."""

    def __init__(self, training: LossTraining):
        self._training = training

    def after_step(self) -> None:
        for name, solver in self._training.solvers.items():
            self.trainer.storage.put_scalar(f"{name}/lr", solver.lr, smoothing_hint=False)
            iteration = self.trainer.iter - self._training.pretrain_iters
            if iteration >= 0:
                solver.advance(iteration)


class GradientPrinter(EventWriter):
    """One line in the log: gradient norms, and the learning rates of solvers."""

    def __init__(self, losses: list[str]):
        """
        Args:
            losses: names of the losses with a solver.
        """
        self._scalars = ["grad_norm", *(f"{n}/{s}" for n in losses for s in ("lr", "grad_norm"))]
        self._last_write = -1

    def write(self) -> None:
        latest = get_event_storage().latest_with_smoothing_hint()
        logged = {name: latest[name] for name in self._scalars if name in latest}
        new = {name: value for name, (value, when) in logged.items() if when > self._last_write}
        if not new:
            return
        self._last_write = max(when for _, when in logged.values())
        values = "  ".join(f"{name}: {value:.4g}" for name, value in new.items())
        logger.info(f" iter: {self._last_write}  {values}")
