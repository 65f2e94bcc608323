"""Find losses that never act on the student, although their terms are logged in every iteration."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from ..distiller.phases import TrainingPhases, reaches_student
from ..losses import DistillLoss

logger = logging.getLogger(__name__)

_MOST = 0.5  # of a run


def check_acting(losses: Mapping[str, DistillLoss], phases: TrainingPhases, max_iter: int) -> None:
    """Log a line on each loss that does not act on the student for most of the run, and on parts that stay fixed.

    Args:
        losses: those of the Distiller, by name.
        phases: of the Distiller.
        max_iter: iterations of the student.

    Raises:
        ValueError: a loss never acts, although its weight is not 0.
    """
    parts = {"BACKBONE": phases.fix_backbone_before, "HEAD": phases.fix_head_before}
    for part, start in parts.items():
        if start >= max_iter:
            logger.warning(
                f"MODEL.DISTILLER.FIX_{part}_BEFORE is {start}: this part of the student is not trained in the "
                f"{max_iter} iterations of this run"
            )
    for name, loss in losses.items():
        _check(name, loss, phases, max_iter)


def _check(name: str, loss: DistillLoss, phases: TrainingPhases, max_iter: int) -> None:
    if getattr(loss.settings, loss.weight_setting) <= 0:
        logger.warning(f"{name} distills nothing: {_keys(loss, [loss.weight_setting])}")
        return
    frozen_before = min(phases.fix_backbone_before, phases.fix_head_before)
    acting = [i for i in range(frozen_before, max_iter) if reaches_student(loss, i)]
    share = len(acting) / max_iter
    causes = _keys(loss, loss.schedule)
    if frozen_before:
        causes += (
            f", MODEL.DISTILLER.FIX_BACKBONE_BEFORE is {phases.fix_backbone_before}, "
            f"FIX_HEAD_BEFORE is {phases.fix_head_before}"
        )
    if not acting:
        raise ValueError(
            f"{name} never acts on the student in the {max_iter} iterations of this run (SOLVER.MAX_ITER): "
            f"{causes}. {_advice(loss, phases, max_iter)}Otherwise train longer, or remove it from "
            "MODEL.DISTILLER.TYPES"
        )
    if share < _MOST:
        logger.warning(
            f"{name} acts on the student in about {share:.0%} of the {max_iter} iterations, from iteration "
            f"{acting[0]} to {acting[-1]}: {causes}"
        )
    last, full = loss.factor(max_iter - 1), loss.settings.weight
    if 0 < last < full:
        logger.warning(
            f"{name} does not reach its weight: it is {last:.3g} of {full:.3g} in the last iteration: "
            f"{_keys(loss, ['warmup_iters'])}"
        )


def _advice(loss: DistillLoss, phases: TrainingPhases, max_iter: int) -> str:
    """The KEY VALUE pairs that let the loss act from the first iteration, where it would start too late."""
    starts = {
        loss.config_key(loss.schedule[0]): getattr(loss.settings, loss.schedule[0]),
        "MODEL.DISTILLER.FIX_BACKBONE_BEFORE": phases.fix_backbone_before,
        "MODEL.DISTILLER.FIX_HEAD_BEFORE": phases.fix_head_before,
    }
    pairs = " ".join(f"{key} 0" for key, start in starts.items() if start >= max_iter)
    return f"To let it act in so short a run, add {pairs}. " if pairs else "Change these keys. "


def _keys(loss: DistillLoss, names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(f"{loss.config_key(name)} is {getattr(loss.settings, name)}" for name in names)
