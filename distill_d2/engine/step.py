"""One training step: forward, backward, update; losses are read without waiting for the device."""

from __future__ import annotations

import math
import time
from typing import Dict, List, Optional, Tuple

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage


class LossReport:
    """Each step's losses, averaged over the processes, put into the event storage.

    On a GPU the values of a step are read while the next one runs, so that the step never waits.
    All processes see the same averages, hence they agree on a non-finite loss, and on stopping when
    one of them was asked to.
    """

    def __init__(self) -> None:
        self.stop = False
        self._pending: Optional[Tuple[int, List[str], torch.Tensor, Optional[torch.cuda.Event]]] = None

    def push(self, losses: Dict[str, torch.Tensor], iteration: int, stop: bool) -> None:
        """Take the losses (scalars on any device) of this iteration."""
        self.flush()
        values = torch.stack([loss.detach().float() for loss in losses.values()])
        values = torch.cat([values, values.new_full((1,), float(stop))])
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(values)
            values = values / comm.get_world_size()
        event = None
        if values.is_cuda:
            host = torch.empty(values.shape, pin_memory=True)
            values, event = host.copy_(values, non_blocking=True), torch.cuda.Event()
            event.record()
        self._pending = (iteration, list(losses), values, event)
        if event is None:
            self.flush()

    def flush(self) -> None:
        """Write the last step's losses.

        Raises:
            FloatingPointError: one of them is not finite; the message names it.
        """
        if self._pending is None:
            return
        iteration, names, values, event = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        *losses, stop = values.tolist()
        self.stop = self.stop or stop > 0
        bad = {name: loss for name, loss in zip(names, losses) if not math.isfinite(loss)}
        if bad:
            raise FloatingPointError(
                f"at iteration {iteration} these losses are not finite: {bad}; all: "
                f"{dict(zip(names, losses))}. No checkpoint is written of it; lower SOLVER.BASE_LR "
                "or the loss's WEIGHT, raise its WARMUP_ITERS, or enable SOLVER.CLIP_GRADIENTS, "
                "and --resume from the last checkpoint"
            )
        storage = get_event_storage()
        storage.put_scalar("total_loss", sum(losses), cur_iter=iteration)
        if len(losses) > 1:
            storage.put_scalars(cur_iter=iteration, **dict(zip(names, losses)))


class TrainStep(SimpleTrainer):
    """detectron2's step, with autocast on any device and a LossReport."""

    def __init__(self, model, data_loader, optimizer, *, autocast_dtype: Optional[torch.dtype]):
        """
        Args:
            autocast_dtype: None for float32; float16 (scaled gradients) or bfloat16.
        """
        super().__init__(model, data_loader, optimizer)
        self.device = next(model.parameters()).device
        self.autocast_dtype = autocast_dtype
        scaled = autocast_dtype is torch.float16 and self.device.type == "cuda"
        self.grad_scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)
        self.report = LossReport()
        self.stop_requested = False

    def run_step(self) -> None:
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        get_event_storage().put_scalar("data_time", time.perf_counter() - start)
        with self._autocast():
            losses = self.model(data)
        self.optimizer.zero_grad()
        self.grad_scaler.scale(sum(losses.values())).backward()
        self.after_backward()
        self.report.push(losses, self.iter, self.stop_requested)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

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
