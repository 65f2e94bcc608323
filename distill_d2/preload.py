"""Start a student from its teacher, the "inheriting strategy" of ICD (NeurIPS 2021), and
the losses' own parameters from an earlier run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .checkpoint import read_checkpoint
from .freeze import matching_names, summary
from .losses import DistillLoss

logger = logging.getLogger(__name__)


@torch.no_grad()
def preload(
    student: nn.Module,
    teacher: nn.Module,
    *,
    fpn: bool = False,
    head: bool = False,
    names: Sequence[str] = (),
) -> int:
    """Copy the teacher's FPN, heads, or tensors of matching names into the student, each into the tensor
    of equal name.

    The FPN is all of the backbone outside the bottom-up network (laterals, outputs, top block); the
    heads are everything outside the backbone. Tensors of another shape are skipped. What was copied,
    skipped and left as it was is logged.

    Args:
        names: regular expressions of names in the student's ``state_dict()``.

    Returns:
        the number of tensors copied.

    Raises:
        ValueError: nothing could be copied; a pattern is no regular expression, or fits no name.
    """
    ours, theirs = student.state_dict(), teacher.state_dict()
    matching = set(matching_names(list(ours), names, "MODEL.DISTILLER.PRELOAD_NAMES"))
    wanted = [
        name for name in ours if name in matching or (fpn and _in_fpn(name)) or (head and _in_head(name))
    ]
    fitting = [n for n in wanted if n in theirs and theirs[n].shape == ours[n].shape]
    if not fitting:
        raise ValueError(
            "MODEL.DISTILLER.PRELOAD_FPN / PRELOAD_HEAD / PRELOAD_NAMES: no tensor of the teacher "
            f"({type(teacher).__name__}) fits the student ({type(student).__name__}); "
            "set the first two to False and the last to []"
        )
    for name in fitting:
        ours[name].copy_(theirs[name])
    logger.info(
        f"Copied {len(fitting)} tensors of the teacher into the student: {summary(fitting)}."
        + _describe_left(wanted, ours, theirs)
    )
    return len(fitting)


def _in_fpn(name: str) -> bool:
    return name.startswith("backbone.") and not name.startswith("backbone.bottom_up.")


def _in_head(name: str) -> bool:
    return not name.startswith("backbone.") and "pixel_" not in name


def _describe_left(
    wanted: Sequence[str], ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]
) -> str:
    """What was wanted and stays as it was."""
    absent = [name for name in wanted if name not in theirs]
    mis_shaped = [
        f"  {name}: teacher {tuple(theirs[name].shape)}, student {tuple(ours[name].shape)}"
        for name in wanted
        if name in theirs and theirs[name].shape != ours[name].shape
    ]
    text = f"\nNot in the teacher, left as they were: {summary(absent)}." if absent else ""
    return text + ("\nSkipped, of another shape:\n" + "\n".join(mis_shaped) if mis_shaped else "")


def preload_losses(losses: Mapping[str, DistillLoss], path: str, part: str) -> int:
    """Start the losses' own parameters from a checkpoint: of ours its entry "distiller", of ICD's
    reference implementation its "teacher".

    Args:
        losses: by registered name.
        path: path or URL.
        part: "all", or "teacher_only": of ICD all but the student's side.

    Returns:
        the number of tensors loaded.

    Raises:
        FileNotFoundError, OSError, ValueError: it cannot be read, holds nothing for these losses, or
            something that does not fit; the message lists keys.
    """
    try:
        checkpoint = read_checkpoint(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"MODEL.DISTILLER.PRELOAD_TEACHER: {error}") from error
    loaded = sum(
        _preload_loss(loss, _state_of(loss, name, checkpoint), part, f"{name}, from '{path}'")
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


def _state_of(loss: DistillLoss, name: str, checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    prefix = f"{name}."
    ours = checkpoint.get("distiller", {})
    found = {key[len(prefix) :]: value for key, value in ours.items() if key.startswith(prefix)}
    return found or loss.from_reference(checkpoint.get("teacher", {}))


def _preload_loss(loss: DistillLoss, state: Mapping[str, torch.Tensor], part: str, source: str) -> int:
    theirs, ours = loss.starting_state(state, part), loss.state_dict()
    if not theirs or not ours:
        return 0
    wrong = {
        "missing": sorted(set(loss.starting_state(ours, part)) - set(theirs)),
        "unknown": sorted(set(theirs) - set(ours)),
        "of another shape": [
            f"{name} {tuple(value.shape)}, here {tuple(ours[name].shape)}"
            for name, value in theirs.items()
            if name in ours and value.shape != ours[name].shape
        ],
    }
    if any(wrong.values()):
        listing = "; ".join(f"{len(v)} {kind}: {v[:5]}" for kind, v in wrong.items() if v)
        raise ValueError(
            f"MODEL.DISTILLER.PRELOAD_TEACHER does not fit {source}: {listing}. Use the settings of "
            "the run that wrote it (HIDDEN_DIM, NUM_CLASSES, ATT_LAYERS, ...)"
        )
    loss.load_state_dict(theirs, strict=False)
    return len(theirs)
