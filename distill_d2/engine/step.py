"""One training step: forward, backward, update; losses are read without waiting for the device."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Callable

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..checkpoint.integrity import is_finite
from ..random_state import random_state, set_random_state
from .loss_report import LossReport
from .nonfinite import describe_weights, rerun


def _image_names(batch: Sequence[Any]) -> list[str]:
    """File, height and width of each image of a batch."""
    return [
        f"{item.get('file_name', 'an image')} ({item['image'].shape[-2]}x{item['image'].shape[-1]})"
        for item in batch or ()
        if isinstance(item, Mapping) and "image" in item
    ]


@dataclass(frozen=True)
class _Part:
    """A micro-batch of a step: its data, the random state before it (with detect_anomaly), its losses, and what
    else is reported of them."""

    data: Any
    state: dict[str, Any]
    losses: dict[str, torch.Tensor]
    extra: Mapping[str, torch.Tensor]


def _mean(losses: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The mean of the micro-batches' losses; one that some lack counts as 0 there."""
    if len(losses) == 1:
        return dict(losses[0])
    names = dict.fromkeys(name for part in losses for name in part)
    return {
        name: torch.stack([part[name] for part in losses if name in part]).sum() / len(losses)
        for name in names
    }


class TrainStep(SimpleTrainer):
    """detectron2's step, with autocast on any device, several optimizers and a LossReport.

    Attributes:
        detect_anomaly: wait for the losses of each step before its update, and repeat a step whose losses are
            not finite to name the operation.
    """

    def __init__(
        self,
        model,
        data_loader,
        optimizer,
        *,
        autocast_dtype: torch.dtype | None,
        own_optimizers: Mapping[str, torch.optim.Optimizer] = MappingProxyType({}),
        frozen_parameters: Callable[[], Sequence[nn.Parameter]] = tuple,
        accumulate: int = 1,
        extra: Callable[..., dict[str, torch.Tensor]] = lambda losses, scale: {},
    ):
        """
        Args:
            optimizer: the student's.
            autocast_dtype: None for float32; float16 (scaled gradients) or bfloat16.
            own_optimizers: those of losses, by their names; with any, gradient norms are reported.
            frozen_parameters: returns the parameters that this step must not change.
            accumulate: the loader's batches in a step; their losses and gradients are averaged.
            extra: returns further scalars to report by name, of the losses of a step's first batch before its
                backward pass, whose graph it leaves; and of the function that scales a loss.
        """
        super().__init__(model, data_loader, optimizer)
        self.device = next(model.parameters()).device
        self.autocast_dtype = autocast_dtype
        scaled = autocast_dtype is torch.float16 and self.device.type == "cuda"
        self.grad_scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.report = LossReport()
        self.stop_requested = False
        self.own_optimizers = dict(own_optimizers)
        self.frozen_parameters = frozen_parameters
        self.accumulate = accumulate
        self.extra = extra
        self.detect_anomaly = False

    def run_step(self) -> None:
        optimizers = [self.optimizer, *self.own_optimizers.values()]
        parts = []
        self._data_time = 0.0
        for index in range(self.accumulate):
            with self._without_synchronization(index + 1 < self.accumulate):
                parts.append(self._backward(optimizers, first=index == 0))
        get_event_storage().put_scalar("data_time", self._data_time)
        for parameter in self.frozen_parameters():
            parameter.grad = None  # not zero: weight decay and momentum would still move it
        self.after_backward()
        images = [name for part in parts for name in _image_names(part.data)]
        try:
            losses = _mean([part.losses for part in parts])
            extra = {**self._gradient_norms(), **parts[0].extra}
            self.report.push(losses, self.iter, self.stop_requested, extra, images)
            if self.detect_anomaly:
                self.report.flush()
        except FloatingPointError as error:
            raise FloatingPointError(str(error) + self._explain(parts)) from None
        self._update(optimizers)

    def _backward(self, optimizers: Sequence[torch.optim.Optimizer], first: bool) -> _Part:
        """Add the gradients of the next micro-batch; before the first one the optimizers' are dropped."""
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        self._data_time += time.perf_counter() - start
        state = random_state() if self.detect_anomaly else {}
        losses = self._forward(data)
        for optimizer in optimizers if first else ():
            optimizer.zero_grad()
        extra = self.extra(losses, self.grad_scaler.scale) if first else {}
        total = sum(losses.values())
        self.grad_scaler.scale(total if self.accumulate == 1 else total / self.accumulate).backward()
        return _Part(data, state, {name: loss.detach() for name, loss in losses.items()}, extra)

    def _without_synchronization(self, active: bool) -> contextlib.AbstractContextManager:
        """Inside, DistributedDataParallel leaves each process its own gradients, if ``active``."""
        wrapped = isinstance(self.model, DistributedDataParallel)
        return self.model.no_sync() if wrapped and active else contextlib.nullcontext()

    def _forward(self, data: Any) -> dict[str, Any]:
        try:
            with self._autocast():
                return self.model(data)
        except FloatingPointError as error:  # of detectron2's RPN
            raise FloatingPointError(
                f"at iteration {self.iter}: {error} The images of process {comm.get_rank()} (height x width) were "
                f"{', '.join(_image_names(data))}.{describe_weights(self._plain_model())}"
            ) from error

    def _plain_model(self) -> nn.Module:
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    def _explain(self, parts: Sequence[_Part]) -> str:
        """What the weights say about losses that are not finite, and with detect_anomaly the operation."""
        text = describe_weights(self._plain_model())
        if not self.detect_anomaly:
            late = text and self.device.type != "cpu"
            text += " On a GPU the step itself may have changed them." if late else ""
            return f"{text} --detect-anomaly names the operation."
        bad = (part for part in parts if not all(map(is_finite, part.losses.values())))
        part = next(bad, parts[0])

        def compute() -> dict[str, torch.Tensor]:
            set_random_state(part.state)
            with self._autocast():
                return self._plain_model()(part.data)

        return text + rerun(self._plain_model(), compute)

    def _update(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """GradScaler takes no optimizer without gradients; a plain step of it changes nothing."""
        active = [optimizer for optimizer in optimizers if _gradients(optimizer)]
        for optimizer in optimizers:
            if optimizer in active:
                self.grad_scaler.step(optimizer)
            else:
                optimizer.step()
        if active:
            self.grad_scaler.update()

    def _gradient_norms(self) -> dict[str, torch.Tensor]:
        """Before clipping. Of optimizers that have gradients in this step."""
        if not self.own_optimizers:
            return {}
        optimizers = {"grad_norm": self.optimizer}
        optimizers.update((f"{name}/grad_norm", own) for name, own in self.own_optimizers.items())
        norms = {}
        for name, optimizer in optimizers.items():
            gradients = _gradients(optimizer)
            if gradients:
                self.grad_scaler.unscale_(optimizer)
                norms[name] = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        return norms

    def _autocast(self):
        return torch.autocast(
            self.device.type,
            dtype=self.autocast_dtype or torch.bfloat16,
            enabled=self.autocast_dtype is not None,
        )

    def state_dict(self):
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.grad_scaler.load_state_dict(state_dict.get("grad_scaler", {}))


def _gradients(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [p.grad for p in parameters if p.grad is not None]
