"""Whether a run can go on with a checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from detectron2.utils import comm
from torch.optim import Optimizer

from ..checkpoint import SafeCheckpointer
from .optimizer import optimizer_signature
from .settings import RunSettings

logger = logging.getLogger(__name__)


def all_have_checkpoint(checkpointer: SafeCheckpointer) -> bool:
    """Whether there is a checkpoint to continue from. All processes call it together.

    Raises:
        ValueError: only some of the processes see it.
    """
    seen = comm.all_gather(checkpointer.has_checkpoint())
    if any(seen) and not all(seen):
        raise ValueError(
            f"--resume: only {sum(seen)} of {len(seen)} processes see a checkpoint in "
            f"{checkpointer.save_dir}; OUTPUT_DIR must be shared by all machines"
        )
    return seen[0]


def check_trainer(state: Mapping[str, Any], folder: str) -> None:
    """Raises ValueError if a trainer's state, of the checkpoint in ``folder``, is not DistillTrainer's."""
    if "_trainer" not in state:  # as those of detectron2's lazyconfig_train_net.py
        raise ValueError(
            f"--resume: the checkpoint in {folder} is of another trainer. Give the file as "
            "MODEL.WEIGHTS (train.init_checkpoint) of a run in another OUTPUT_DIR"
        )


def check_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Raises ValueError if a trainer's state is of another optimizer of the student, of other tensors, or of
    tensors in other groups."""
    signature = optimizer_signature(optimizer)
    if state.get("optimizer_kind", signature) != signature:
        raise ValueError(
            f"--resume: the checkpoint's optimizer is {state['optimizer_kind']}, this run's is "
            f"{signature} (SOLVER.OPTIMIZER, MODEL.DISTILLER.FREEZE, MODEL.BACKBONE.FREEZE_AT). Use the "
            "checkpoint's settings, another OUTPUT_DIR, or start without --resume"
        )
    saved = state["_trainer"]["optimizer"]["param_groups"]
    sizes, own_sizes = ([len(g["params"]) for g in groups] for groups in (saved, optimizer.param_groups))
    if sizes != own_sizes:
        keys = "BACKBONE_LR_FACTOR, LAYER_DECAY, BIAS_LR_FACTOR, WEIGHT_DECAY_NORM, WEIGHT_DECAY_BIAS"
        raise ValueError(
            f"--resume: the checkpoint's optimizer has groups of {sizes} tensors with a learning rate and weight "
            f"decay each, this run's has {own_sizes} (SOLVER.{keys}). Use the checkpoint's settings, another "
            "OUTPUT_DIR, or start without --resume"
        )


def check_length(iteration: int, pretrain_iters: int, settings: RunSettings) -> None:
    """Log it if the checkpoint's run is complete.

    Args:
        iteration: the first that is trained now, those of pretraining included.

    Raises:
        ValueError: it is longer than this run.
    """
    done = iteration - pretrain_iters
    if done < settings.max_iter:
        return
    trained = f"the checkpoint in {settings.output_dir} has trained {done} iterations"
    if done > settings.max_iter:
        raise ValueError(
            f"--resume: SOLVER.MAX_ITER (train.max_iter) is {settings.max_iter}, but {trained}. Raise "
            "it, or start without --resume in another OUTPUT_DIR"
        )
    logger.info(f"--resume: {trained}, all of them: nothing is left to train")
