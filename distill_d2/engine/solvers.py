"""Optimizers and learning rate schedules of losses that have their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.solver import build_lr_scheduler
from omegaconf import DictConfig, OmegaConf

from ..config import solver_config
from ..losses import DistillLoss, TrainedLoss
from .optimizer import create_optimizer, has_own_solver, optimizer_signature

_KEY = "MODEL.DISTILLER.SOLVER"
_SCHEDULES = ("WarmupCosineLR", "WarmupMultiStepLR")
_WARMUPS = ("linear", "constant")


class LossSolver:
    """Optimizer and learning rate schedule of one loss's parameters.

    Attributes:
        optimizer: trains all trainable parameters of the loss, with one learning rate and weight decay.
    """

    def __init__(self, loss: TrainedLoss, max_iter: int, steps: Sequence[int] | None):
        """
        Args:
            loss: has a ``solver``, whose missing keys get their defaults.
            max_iter: MAX_ITER of the student's SOLVER.
            steps: STEPS of the student's SOLVER; None for those of the loss's solver.

        Raises:
            KeyError, ValueError: the loss's solver has an unknown key or value.
        """
        node = solver_config()
        node.merge_from_other_cfg(_plain(loss.solver))
        node.MAX_ITER = max_iter
        node.STEPS = tuple(node.STEPS if steps is None else steps)
        _check(node)
        parameters = [p for p in loss.parameters() if p.requires_grad]
        self._loss = loss
        self.optimizer = create_optimizer(node, [{"params": parameters}], _KEY)
        self._scheduler = build_lr_scheduler(CfgNode({"SOLVER": node}), self.optimizer)

    @property
    def lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def advance(self, iteration: int) -> None:
        """Advance the schedule, if the loss allows it."""
        if self._loss.solver_advances(iteration):
            self._scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": optimizer_signature(self.optimizer),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the state is that of another optimizer or of other parameters."""
        signature = optimizer_signature(self.optimizer)
        if state["kind"] != signature:
            raise ValueError(
                f"--resume: the checkpoint's optimizer of {type(self._loss).__name__} is "
                f"{state['kind']}, this run's is {signature} ({_KEY}.OPTIMIZER, and the loss's "
                "settings). Use the checkpoint's settings, another OUTPUT_DIR, or start without --resume"
            )
        self.optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])


def build_solvers(
    losses: Mapping[str, DistillLoss], max_iter: int, steps: Sequence[int] | None
) -> dict[str, LossSolver]:
    """A LossSolver for each loss that asks for one, by the loss's name.

    Raises:
        KeyError, ValueError: see LossSolver.
    """
    return {
        name: LossSolver(loss, max_iter, steps)
        for name, loss in losses.items()
        if isinstance(loss, TrainedLoss) and has_own_solver(loss)
    }


def _plain(solver: Mapping[str, Any] | None) -> CfgNode:
    """A node of plain values, also for the DictConfig of a LazyConfig."""
    values = OmegaConf.to_container(solver, resolve=True) if isinstance(solver, DictConfig) else solver
    return CfgNode(values)


def _check(node: CfgNode) -> None:
    """Raises ValueError for values that would fail in the schedule, some only at its end."""
    if node.LR_SCHEDULER_NAME not in _SCHEDULES:
        raise ValueError(
            f"{_KEY}.LR_SCHEDULER_NAME is '{node.LR_SCHEDULER_NAME}'; expected one of {list(_SCHEDULES)}"
        )
    if not 0 <= node.BASE_LR_END <= node.BASE_LR or node.BASE_LR == 0:
        raise ValueError(
            f"{_KEY}: expected BASE_LR above 0 and BASE_LR_END from 0 to BASE_LR; got BASE_LR "
            f"{node.BASE_LR}, BASE_LR_END {node.BASE_LR_END}"
        )
    if node.WARMUP_METHOD not in _WARMUPS:
        raise ValueError(
            f"{_KEY}.WARMUP_METHOD is '{node.WARMUP_METHOD}'; expected one of {list(_WARMUPS)}"
        )
    if node.RESCALE_INTERVAL and node.WARMUP_ITERS >= node.MAX_ITER:
        raise ValueError(
            f"{_KEY}.RESCALE_INTERVAL needs WARMUP_ITERS, {node.WARMUP_ITERS}, below the length of the "
            f"run, {node.MAX_ITER}"
        )
