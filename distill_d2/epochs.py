"""Lengths in epochs beside detectron2's in iterations: of two layers of a config, the later one decides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a config file is checked before torch is imported
    from detectron2.config import CfgNode

#: Keys in iterations, and the keys in epochs that replace them where they are above 0.
IN_EPOCHS = {
    "SOLVER.MAX_ITER": "SOLVER.EPOCHS",
    "SOLVER.CHECKPOINT_PERIOD": "SOLVER.CHECKPOINT_EPOCHS",
    "TEST.EVAL_PERIOD": "TEST.EVAL_EPOCHS",
}


def iterations_of(epochs: float, images: int, batch: int) -> int:
    """The iterations in which each of ``images`` is seen in so many epochs, at least 1.

    Args:
        batch: the images of an iteration, of all processes.
    """
    exact = epochs * images / batch
    return max(1, math.ceil(round(exact, 6)))  # 0.1 * 30 is more than 3


def file_decides(values: dict[str, Any], source: str) -> None:
    """Let a length in iterations, of a config file, replace one in epochs that the file inherits.

    Args:
        values: of the file alone; changed in place.
        source: of the file, for the message.

    Raises:
        ValueError: it sets both.
    """
    for in_iterations, in_epochs in IN_EPOCHS.items():
        node, name = in_iterations.split(".")
        keys = values.get(node)
        if isinstance(keys, dict) and name in keys:
            if keys.setdefault(in_epochs.split(".")[1], 0):
                raise both_given(source, in_iterations, in_epochs)


def options_decide(cfg: CfgNode, keys: Sequence[str]) -> None:
    """The same for the KEY VALUE pairs of the command line, whose ``keys`` are set in the config."""
    for in_iterations, in_epochs in IN_EPOCHS.items():
        if in_iterations not in keys:
            continue
        node, name = in_epochs.split(".")
        if in_epochs not in keys:
            cfg[node][name] = 0.0
        elif cfg[node][name]:
            raise both_given("the command line", in_iterations, in_epochs)


def both_given(source: str, in_iterations: str, in_epochs: str) -> ValueError:
    return ValueError(f"{source} sets {in_iterations} and {in_epochs}; give one of them")
