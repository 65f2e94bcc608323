"""Losses of each step, read without waiting for the device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage


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
                smooth = not name.startswith(
                    "grad_ratio/"
                )  # some steps have one, so each is logged as it is
                storage.put_scalar(name, value, cur_iter=step.iteration, smoothing_hint=smooth)


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
