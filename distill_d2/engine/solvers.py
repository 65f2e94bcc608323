"""The optimizers of losses that train their parameters by one of their own."""

from __future__ import annotations

from typing import Any, Dict, Optional, Sequence

from detectron2.config import CfgNode
from detectron2.solver import build_lr_scheduler
from torch import nn

from ..config import solver_config
from ..distiller import Distiller
from ..losses import DistillLoss
from .optimizer import create_optimizer, has_own_solver

_KEY = "MODEL.DISTILLER.SOLVER"


class LossSolver:
    """Optimizer and learning rate schedule of one loss's parameters.

    Attributes:
        optimizer: of all trainable parameters of the loss, with one rate and one weight decay.
    """

    def __init__(self, loss: DistillLoss, max_iter: int, steps: Optional[Sequence[int]]):
        """
        Args:
            loss: with ``solver``, whose missing keys get their defaults.
            max_iter, steps: MAX_ITER and STEPS of the student's SOLVER; steps None: the loss's own.

        Raises:
            KeyError, ValueError: the loss's solver has an unknown key or value.
        """
        node = solver_config()
        node.merge_from_other_cfg(CfgNode(loss.solver))
        node.MAX_ITER = max_iter
        node.STEPS = tuple(node.STEPS if steps is None else steps)
        parameters = [p for p in loss.parameters() if p.requires_grad]
        self._loss = loss
        self.optimizer = create_optimizer(node, [{"params": parameters}], _KEY)
        try:
            self._scheduler = build_lr_scheduler(CfgNode({"SOLVER": node}), self.optimizer)
        except ValueError as error:
            raise ValueError(f"{_KEY}: {error}") from error

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def advance(self, iteration: int) -> None:
        """Go on to the next iteration's learning rate, unless the loss says no."""
        if self._loss.solver_advances(iteration):
            self._scheduler.step()

    def state_dict(self) -> Dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scheduler": self._scheduler.state_dict()}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])


def build_solvers(
    model: nn.Module, max_iter: int, steps: Optional[Sequence[int]]
) -> Dict[str, LossSolver]:
    """A LossSolver for each loss of a Distiller that asks for one, by the loss's name.

    Raises:
        KeyError, ValueError: see LossSolver.
    """
    if not isinstance(model, Distiller):
        return {}
    return {
        name: LossSolver(loss, max_iter, steps)
        for name, loss in model.losses.items()
        if has_own_solver(loss)
    }
