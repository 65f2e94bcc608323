"""Build what a MODEL.DISTILLER node describes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode

from ..data import box_statistics
from ..losses import DistillLoss, TrainedLoss, build_losses
from ..teacher import teacher_of


def node_arguments(distiller: CfgNode, device: str, datasets: Sequence[str]) -> dict[str, Any]:
    """The arguments of Distiller that a MODEL.DISTILLER node decides.

    Args:
        distiller: the node.
        device: of the teacher.
        datasets: names of the training datasets, for losses that use their statistics.

    Raises:
        FileNotFoundError, KeyError, OSError, ValueError: the teacher or a loss cannot be built.
    """
    with separate_randomness():
        losses, teacher = build_losses(distiller), teacher_of(distiller, device)
    use_statistics(losses.values(), datasets)
    return {
        "losses": losses,
        "teacher": teacher,
        "task_loss_weight": distiller.TASK_LOSS_WEIGHT,
        "preload_fpn": distiller.PRELOAD_FPN,
        "preload_head": distiller.PRELOAD_HEAD,
        "preload_names": distiller.PRELOAD_NAMES,
        "preload_teacher": distiller.PRELOAD_TEACHER,
        "preload_type": distiller.PRELOAD_TYPE,
        "pretrain_iters": distiller.PRETRAIN_TEACHER_ITERS,
        "fix_backbone_before": distiller.FIX_BACKBONE_BEFORE,
        "fix_head_before": distiller.FIX_HEAD_BEFORE,
        "freeze_names": distiller.FREEZE,
        "gradient_ratio_period": distiller.GRADIENT_RATIO_PERIOD,
    }


def use_statistics(losses: Iterable[DistillLoss], datasets: Sequence[str]) -> None:
    """Let trained losses compute the statistics of these datasets' boxes; without datasets none."""
    if not datasets:
        return
    for loss in losses:
        if isinstance(loss, TrainedLoss):
            loss.use_statistics(functools.partial(box_statistics, datasets))


@contextlib.contextmanager
def separate_randomness() -> Iterator[None]:
    """Keep the random numbers drawn inside from changing those outside (law 1)."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield
