"""Numbers of a detector that training changes and its state_dict lacks, such as moving averages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..views import view_type


def training_state(model: nn.Module) -> dict[str, float]:
    """The values of the ``training_state`` that the detector's view names, as far as it has them."""
    return {
        name: float(getattr(owner, attribute))
        for name, owner, attribute in _places(model)
        if hasattr(owner, attribute)
    }


def set_training_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Restore what ``training_state`` gave; other entries are left alone."""
    for name, owner, attribute in _places(model):
        if name not in state:
            continue
        value = getattr(owner, attribute, None)
        if isinstance(value, torch.Tensor):
            value.fill_(state[name])
        else:
            setattr(owner, attribute, state[name])


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """The dotted name of each number, the module that holds it, and its name there."""
    modules = dict(model.named_modules())
    for name in view_type(model).training_state:
        path, _, attribute = name.rpartition(".")
        if path in modules:
            yield name, modules[path], attribute
