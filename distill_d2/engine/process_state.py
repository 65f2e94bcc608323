"""What a checkpoint's "model" lacks: numbers, buffers and random generators that each process has for itself."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.utils import comm
from torch import nn

from ..moving_numbers import numbers_of, set_numbers
from ..random_state import random_state
from .ema import AveragedWeights


class ProcessState:
    """The state of each process that differs from that of process 0, or that no state_dict has.

    That is the random state; numbers that the detector's view names, such as RetinaNet's moving average of
    positive anchors; batch norm's statistics, which each process measures on its own images; and buffers that
    are not persistent, but that training changes.
    """

    def __init__(self, model: nn.Module, student: nn.Module, average: AveragedWeights):
        """
        Args:
            model: with all buffers, before the first step.
            student: the detector in it.
            average: of the student's weights.
        """
        self._model = model
        self._average = average
        self._student = student
        buffers = dict(model.named_buffers())
        self._untrained = {
            name: _digest(buffers[name]) for name in _not_persistent(model) & set(buffers)
        }

    def gather(self) -> list[dict[str, Any]]:
        """The state of each process, by rank; all processes call it together."""
        buffers = self._buffers()
        own = self._changed(buffers) | self._differing(buffers)
        return comm.all_gather(
            {
                "random": random_state(),
                "numbers": numbers_of(self._student),
                "buffers": {name: buffers[name].detach().cpu() for name in sorted(own)},
            }
        )

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore numbers and buffers of one of the states that ``gather`` gave; see ``set_random_state``."""
        set_numbers(self._student, state["numbers"])
        buffers = self._buffers()
        for name, saved in state["buffers"].items():
            if name in buffers and buffers[name].shape == saved.shape:
                with torch.no_grad():
                    buffers[name].copy_(saved)

    def _buffers(self) -> dict[str, torch.Tensor]:
        return {**dict(self._model.named_buffers()), **self._average.buffers()}

    def _changed(self, buffers: Mapping[str, torch.Tensor]) -> set[str]:
        """Names of the buffers that are not persistent and were changed by training."""
        start = self._untrained
        return {name for name in start if name in buffers and _digest(buffers[name]) != start[name]}

    @staticmethod
    def _differing(buffers: Mapping[str, torch.Tensor]) -> set[str]:
        """Names of the buffers that are not the same in all processes."""
        if comm.get_world_size() == 1:
            return set()
        first, *others = comm.all_gather({name: _digest(buffer) for name, buffer in buffers.items()})
        return {name for name in first if any(other.get(name) != first[name] for other in others)}


def _not_persistent(model: nn.Module) -> set[str]:
    """Names of the buffers that no state_dict has."""
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }


def _digest(buffer: torch.Tensor) -> tuple[tuple[int, ...], int]:
    """Shape and checksum."""
    data = buffer.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return tuple(buffer.shape), zlib.crc32(data.tobytes())
