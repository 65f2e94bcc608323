"""The moving average of the student's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from detectron2.engine import HookBase
from torch import nn

_TRAINED = "trained_weights"
_SLOW_START = 10  # after n steps the decay is at most (1 + n) / (_SLOW_START + n)


class AveragedWeights(HookBase):
    """A moving average of the student's weights, which is evaluated and saved in their place.

    After each step ``average = decay * average + (1 - decay) * trained``, of all parameters and all buffers of
    floating point numbers, such as batch norm's statistics. In the first steps the decay is smaller, so that the
    average does not hold on to the weights of the start. It is kept on the student's device.
    """

    def __init__(self, student: nn.Module, decay: float):
        """
        Args:
            decay: SOLVER.EMA; 0: there is no average, and nothing is done.
        """
        self._student = student
        self._decay = decay
        self._saved = set(student.state_dict())
        self._average: dict[str, torch.Tensor] = {}
        self._applied = False

    def before_train(self) -> None:
        if self._decay and not self._average:
            self._start()

    @torch.no_grad()
    def after_step(self) -> None:
        if not self._decay or self.trainer.pretraining:
            return
        steps = self.trainer.iter - self.trainer.loss_training.pretrain_iters + 1
        decay = min(self._decay, (1 + steps) / (_SLOW_START + steps))
        trained = self._tensors()
        average = [self._average[name] for name in trained]
        torch._foreach_lerp_(average, list(trained.values()), 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the student has the average; its tensors change places with it, and nothing is copied."""
        if not self._decay:
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def entries(self) -> dict[str, Any]:
        """Of the trainer's state: the weights that are trained, also inside ``applied``."""
        if not self._decay:
            return {}
        source = self._average if self._applied else self._tensors()
        return {_TRAINED: {name: tensor.detach() for name, tensor in source.items()}}

    @torch.no_grad()
    def continue_from(self, entries: Mapping[str, Any]) -> None:
        """Go on from a checkpoint whose "model", which the student has, is the average.

        Args:
            entries: of the trainer's state; those of a run without an average start one.
        """
        if self._decay:
            self._start()
        tensors = self._student.state_dict()
        for name, trained in entries.get(_TRAINED, {}).items():
            tensors[name].copy_(trained)

    def buffers(self) -> dict[str, torch.Tensor]:
        """Of the average: each process has its own of what is not trained."""
        own = {name for name, _ in self._student.named_buffers()}
        return {f"average.{name}": tensor for name, tensor in self._average.items() if name in own}

    @torch.no_grad()
    def _start(self) -> None:
        self._average = {name: tensor.clone() for name, tensor in self._tensors().items()}

    def _tensors(self) -> dict[str, torch.Tensor]:
        """What is averaged: parameters and buffers that a checkpoint has, each once."""
        named = (*self._student.named_parameters(), *self._student.named_buffers())
        return {name: t for name, t in named if name in self._saved and t.is_floating_point()}

    def _exchange(self) -> None:
        for name, tensor in self._tensors().items():
            tensor.data, self._average[name] = self._average[name], tensor.data
        self._applied = not self._applied
