"""Start the losses' own parameters from a checkpoint of an earlier run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from .checkpoint import read_checkpoint
from .losses import DistillLoss, TrainedLoss

logger = logging.getLogger(__name__)

State = dict[str, torch.Tensor]


def initialize_losses(losses: Mapping[str, DistillLoss], path: str, part: str) -> int:
    """Load the losses' parameters from a checkpoint: from the entry "distiller" of one of this package,
    or from the entry "teacher" of one of ICD's reference implementation.

    Args:
        losses: by registered name.
        path: path or URL.
        part: "all", or "teacher_only", which in ICD is all but the student's side.

    Returns:
        the number of tensors loaded.

    Raises:
        FileNotFoundError, OSError, ValueError: it cannot be read, has nothing for these losses, or
            something that does not fit; the message lists keys.
    """
    try:
        checkpoint = read_checkpoint(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"MODEL.DISTILLER.PRELOAD_TEACHER: {error}") from error
    loaded = sum(
        _initialize_loss(loss, _state_of(loss, name, checkpoint), part, f"{name}, from '{path}'")
        for name, loss in losses.items()
    )
    if not loaded:
        raise ValueError(
            f"MODEL.DISTILLER.PRELOAD_TEACHER '{path}' holds no parameters of {list(losses)}; expected "
            'a checkpoint of train_distill.py with these losses (its "distiller"), or of the reference '
            f'implementation of ICD (its "teacher"). It has {sorted(checkpoint)}'
        )
    logger.info(f"Loaded {loaded} tensors of the losses from {path} ({part}).")
    return loaded


def _state_of(loss: DistillLoss, name: str, checkpoint: Mapping[str, Any]) -> State:
    prefix = f"{name}."
    saved = checkpoint.get("distiller", {})
    state = {key[len(prefix) :]: value for key, value in saved.items() if key.startswith(prefix)}
    if not state and isinstance(loss, TrainedLoss):
        return loss.from_reference(checkpoint.get("teacher", {}))
    return state


def _starting_state(loss: DistillLoss, state: State, part: str) -> State:
    return loss.starting_state(state, part) if isinstance(loss, TrainedLoss) else state


def _initialize_loss(loss: DistillLoss, state: State, part: str, source: str) -> int:
    loaded, own = _starting_state(loss, state, part), loss.state_dict()
    if not loaded or not own:
        return 0
    wrong = {
        "missing": sorted(set(_starting_state(loss, own, part)) - set(loaded)),
        "unknown": sorted(set(loaded) - set(own)),
        "of another shape": [
            f"{name} {tuple(value.shape)}, here {tuple(own[name].shape)}"
            for name, value in loaded.items()
            if name in own and value.shape != own[name].shape
        ],
    }
    if any(wrong.values()):
        listing = "; ".join(f"{len(v)} {kind}: {v[:5]}" for kind, v in wrong.items() if v)
        raise ValueError(
            f"MODEL.DISTILLER.PRELOAD_TEACHER does not fit {source}: {listing}. Use the settings of "
            "the run that wrote it (HIDDEN_DIM, NUM_CLASSES, ATT_LAYERS, ...)"
        )
    loss.load_state_dict(loaded, strict=False)
    return len(loaded)
