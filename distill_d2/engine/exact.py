"""The same bits from a process that goes on and from one that resumes, on a CPU."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from detectron2.utils import comm
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel


def exact_torchscript(device: str) -> contextlib.AbstractContextManager:
    """TorchScript functions compute the same bits in their first calls and later, on a CPU.

    TorchScript optimizes a function after its first calls, and then rounds otherwise: the process that
    resumes a run would differ from the one that went on. A GPU repeats no bits anyway, and its fused
    kernels save memory.
    """
    if torch.device(device).type != "cpu":
        return contextlib.nullcontext()
    return torch.jit.optimized_execution(False)


def exact_gradients(model: Any) -> None:
    """Gradients of three and more processes are added in the order of the processes, on a CPU.

    DistributedDataParallel orders gradients in memory anew after its first step, and gloo adds those of several
    processes in an order that depends on their place in memory. A sum of two is the same in any order.
    """
    if isinstance(model, DistributedDataParallel) and comm.get_world_size() > 2:
        model.register_comm_hook(None, _mean)


def _mean(_, bucket):  # DistributedDataParallel reads annotations, and knows none that are strings
    """A Future of the mean of the processes' gradients in a dist.GradBucket."""
    own = bucket.buffer()
    parts = [torch.empty_like(own) for _ in range(comm.get_world_size())]
    gathered = dist.all_gather(parts, own, async_op=True).get_future()
    return gathered.then(lambda _: torch.stack(parts).sum(dim=0).div_(len(parts)))
