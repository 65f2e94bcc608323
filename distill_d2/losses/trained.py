"""Losses with parameters that are trained apart from the student, such as the decoder of ICD."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable

import torch
from detectron2.config import CfgNode as CN
from torch import nn

from ..views import Batch, DetectorView
from .base import DistillLoss

if TYPE_CHECKING:
    from ..data.statistics import BoxStatistics


class TrainedLoss(DistillLoss):
    """A loss whose parameters have an optimizer, a schedule, or training steps of their own.

    DistillTrainer serves all of this. Under another trainer one optimizer trains all parameters, there
    is no pretraining, and ``frozen_parameters`` are not frozen.
    """

    #: The SOLVER node (keys of MODEL.DISTILLER.SOLVER; missing ones have its defaults) of an optimizer
    #: for this loss's parameters alone; None: the student's optimizer trains them.
    solver: CN | None = None

    def pretrain(self, teacher: DetectorView, batch: Batch) -> dict[str, torch.Tensor]:
        """The terms that train this loss's parameters before the student is trained.

        Called in the steps of MODEL.DISTILLER.PRETRAIN_TEACHER_ITERS, where ``batch.iteration`` is below
        0. The terms are summed without a weight. Parameters that no term reaches get a gradient of zero,
        which DDP needs; to keep weight decay off them, return them from ``frozen_parameters``.

        Returns:
            scalars in float32 by name.
        """
        raise NotImplementedError(f"{type(self).__name__}.pretrain")

    def reaches_student(self, iteration: int) -> bool:
        """Whether gradients of this loss reach the student at this iteration, if its weight is not 0."""
        return True

    def solver_advances(self, iteration: int) -> bool:
        """Whether the learning rate schedule of ``solver`` advances after this iteration."""
        return True

    def frozen_parameters(self, iteration: int) -> list[nn.Parameter]:
        """Parameters that do not change in this step; the trainer drops their gradients."""
        return []

    def use_statistics(self, statistics: Callable[[], BoxStatistics]) -> None:
        """Receive the frequencies and sizes of the training data's boxes; called before ``bind``.

        Args:
            statistics: computes them, which may take a while, so call it only if they are needed.
        """

    def starting_state(self, state: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
        """Choose from this loss's parameters in an earlier run's checkpoint those to start from.

        Args:
            state: tensors by their names in this loss's ``state_dict()``.
            part: MODEL.DISTILLER.PRELOAD_TYPE, "all" or "teacher_only".
        """
        return state

    def from_reference(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Convert parameters from a checkpoint of the authors' implementation to this loss's names.

        Args:
            state: the checkpoint's entry "teacher".

        Returns:
            tensors by their names in this loss's ``state_dict()``; empty if there are none.
        """
        return {}
