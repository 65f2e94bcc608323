"""The moving average of the student's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from detectron2.engine import HookBase
from torch import nn

_SLOW_START = 10  # after n steps the decay is at most (1 + n) / (_SLOW_START + n)


class AveragedWeights(HookBase):
    """A moving average of the student's weights, which is evaluated and saved in their place.

    After each step ``average = decay * average + (1 - decay) * trained``, of all parameters and all buffers of
    floating point numbers, such as batch norm's statistics. In the first steps the decay is smaller, so that the
    average does not hold on to the weights of the start. It is kept on the student's device.
    """

    def __init__(self, student: nn.Module, decay: float):
        self._student = student
        self._decay = decay
        self._saved = set(student.state_dict())
        self._average: dict[str, torch.Tensor] = {}
        self._applied = False

    def before_train(self) -> None:
        if not self._average:
            self._start()

    @torch.no_grad()
    def after_step(self) -> None:
        if self.trainer.pretraining:
            return
        steps = self.trainer.iter - self.trainer.loss_training.pretrain_iters + 1
        decay = min(self._decay, (1 + steps) / (_SLOW_START + steps))
        trained = self._tensors()
        average = [self._average[name] for name in trained]
        torch._foreach_lerp_(average, list(trained.values()), 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the student has the average; its tensors change places with it, and nothing is copied."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def trained(self) -> dict[str, torch.Tensor]:
        """The weights that are trained, by their names in the student's state_dict, also inside ``applied``."""
        source = self._average if self._applied else self._tensors()
        return {name: tensor.detach() for name, tensor in source.items()}

    def continue_from(self, trained: Mapping[str, torch.Tensor] | None) -> None:
        """Go on from a checkpoint whose "model" the student has: the average.

        Args:
            trained: of the checkpoint; None if its run had no average: the weights start a new one.
        """
        self._start()
        if trained is not None:
            use_trained(self._student, trained)

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


@torch.no_grad()
def use_trained(student: nn.Module, trained: Mapping[str, torch.Tensor]) -> None:
    """Give a student the weights of ``AveragedWeights.trained``."""
    tensors = dict(student.state_dict())
    for name, tensor in trained.items():
        tensors[name].copy_(tensor)
