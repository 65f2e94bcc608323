"""One training step: forward, backward, update; losses are read without waiting for the device."""

from __future__ import annotations

import math
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

from ..random_state import random_state, set_random_state
from .nonfinite import describe_weights, rerun


@dataclass(frozen=True)
class _Pending:
    """The values of a step, which may still be on their way to the host."""

    iteration: int
    losses: list[str]
    extra: list[str]
    # Those of the losses, the extra ones, and whether a process was asked to stop (1) or not (0).
    values: torch.Tensor
    # Marks the arrival of the values on the host; None if they are there.
    event: torch.cuda.Event | None
    images: list[str]


class LossReport:
    """Each step's losses and extra values, averaged over the processes, put into the event storage.

    On a GPU the values of a step are read while the next one runs, so that the step never waits.
    All processes see the same averages, hence they agree on a non-finite loss, and on stopping when
    one of them was asked to stop.
    """

    def __init__(self) -> None:
        self.stop = False
        self._pending: _Pending | None = None

    def push(
        self,
        losses: dict[str, torch.Tensor],
        iteration: int,
        stop: bool,
        extra: Mapping[str, torch.Tensor] = MappingProxyType({}),
        images: Sequence[str] = (),
    ) -> None:
        """Take the values of a step.

        Args:
            losses: scalars on one device.
            stop: whether this process was asked to stop.
            extra: further scalars on that device, which are not losses.
            images: names of the step's images, for the message about a loss that is not finite.

        Raises:
            FloatingPointError: see ``flush``.
        """
        self.flush()
        values = torch.stack([v.detach().float() for v in (*losses.values(), *extra.values())])
        values = torch.cat([values, values.new_full((1,), float(stop))])
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(values)
            values = values / comm.get_world_size()
        event = None
        if values.is_cuda:
            host = torch.empty(values.shape, pin_memory=True)
            values, event = host.copy_(values, non_blocking=True), torch.cuda.Event()
            event.record()
        self._pending = _Pending(iteration, list(losses), list(extra), values, event, list(images))
        if event is None:
            self.flush()

    def flush(self) -> None:
        """Write the last step's losses.

        Raises:
            FloatingPointError: one of them is not finite; the message names it, the iteration and
                the images.
        """
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        if step.event is not None:
            step.event.synchronize()
        *values, stop = step.values.tolist()
        self.stop = self.stop or stop > 0
        losses, extra = dict(zip(step.losses, values)), dict(zip(step.extra, values[len(step.losses) :]))
        _check_finite(losses, step)
        storage = get_event_storage()
        storage.put_scalar("total_loss", sum(losses.values()), cur_iter=step.iteration)
        if len(losses) > 1:
            storage.put_scalars(cur_iter=step.iteration, **losses)
        for name, value in extra.items():
            if math.isfinite(value):  # float16 may overflow; the update is skipped, and JSON has no inf
                storage.put_scalar(name, value, cur_iter=step.iteration)


def _check_finite(losses: Mapping[str, float], step: _Pending) -> None:
    bad = {name: loss for name, loss in losses.items() if not math.isfinite(loss)}
    if not bad:
        return
    # All processes are here, because they have the same averages.
    images = enumerate(comm.all_gather(step.images))
    listing = "; ".join(f"of process {rank} {', '.join(names)}" for rank, names in images)
    raise FloatingPointError(
        f"at iteration {step.iteration} these losses are not finite: {bad}; all: {dict(losses)}. "
        f"The images (height x width) were {listing}. No checkpoint of this step is written; lower "
        "SOLVER.BASE_LR or the loss's WEIGHT, raise its WARMUP_ITERS, or enable SOLVER.CLIP_GRADIENTS, and "
        "--resume from the last checkpoint."
    )


def _image_names(batch: Sequence[Any]) -> list[str]:
    """File, height and width of each image of a batch."""
    return [
        f"{item.get('file_name', 'an image')} ({item['image'].shape[-2]}x{item['image'].shape[-1]})"
        for item in batch or ()
        if isinstance(item, Mapping) and "image" in item
    ]


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
    ):
        """
        Args:
            optimizer: the student's.
            autocast_dtype: None for float32; float16 (scaled gradients) or bfloat16.
            own_optimizers: those of losses, by their names; with any, gradient norms are reported.
            frozen_parameters: returns the parameters that this step must not change.
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
        self.detect_anomaly = False

    def run_step(self) -> None:
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        get_event_storage().put_scalar("data_time", time.perf_counter() - start)
        state = random_state() if self.detect_anomaly else {}
        losses = self._forward(data)
        optimizers = [self.optimizer, *self.own_optimizers.values()]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.grad_scaler.scale(sum(losses.values())).backward()
        for parameter in self.frozen_parameters():
            parameter.grad = None  # not zero: weight decay and momentum would still move it
        self.after_backward()
        try:
            self.report.push(
                losses, self.iter, self.stop_requested, self._gradient_norms(), _image_names(data)
            )
            if self.detect_anomaly:
                self.report.flush()
        except FloatingPointError as error:
            raise FloatingPointError(str(error) + self._explain(data, state)) from None
        self._update(optimizers)

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

    def _explain(self, data: Any, state: dict[str, Any]) -> str:
        """What the weights say about losses that are not finite, and with detect_anomaly the operation."""
        text = describe_weights(self._plain_model())
        if not self.detect_anomaly:
            late = text and self.device.type != "cpu"
            text += " On a GPU the step itself may have changed them." if late else ""
            return f"{text} --detect-anomaly names the operation."

        def compute() -> dict[str, torch.Tensor]:
            set_random_state(state)
            with self._autocast():
                return self._plain_model()(data)

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
