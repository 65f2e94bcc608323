"""The weights with which each distillation loss pulls on the student as strongly as its own losses do."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ..balance import balanced_weight
from ..checkpoint import write_whole
from ..gradients import TermGradients
from ..losses import DistillLoss, TrainedLoss
from ..pairs import pairs_of


def balanced_weights(
    losses: Mapping[str, DistillLoss], measured: TermGradients, ratio: float
) -> dict[str, float]:
    """By config key, the weight with which the gradient of a loss would be ``ratio`` times the task's.

    A loss whose gradient cannot be compared has none, nor has one with a GRADIENT_RATIO, nor a TrainedLoss: before
    it has learned, its gradient says little.
    """
    found = {
        loss.config_key(loss.weight_setting): balanced_weight(name, loss, measured, ratio)
        for name, loss in losses.items()
        if not isinstance(loss, TrainedLoss) and not loss.settings.gradient_ratio
    }
    return {key: weight for key, weight in found.items() if weight is not None}


def write_weights(path: str, base: str, opts: Sequence[str], weights: Mapping[str, float]) -> None:
    """Write a config that inherits from another one, with KEY VALUE pairs and these weights.

    Raises:
        OSError: it cannot be written.
    """
    values: dict[str, Any] = {"_BASE_": os.path.relpath(base, os.path.dirname(path) or ".")}
    words = pairs_of(opts)
    pairs = {**dict(zip(words[::2], map(yaml.safe_load, words[1::2]))), **weights}
    for key, value in pairs.items():
        *nodes, name = key.split(".")
        node = values
        for each in nodes:
            node = node.setdefault(each, {})
        node[name] = value
    text = yaml.safe_dump(values, sort_keys=False)
    write_whole(path, lambda file: file.write(text.encode()))
