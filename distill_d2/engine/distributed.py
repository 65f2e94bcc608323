"""DistributedDataParallel on GPU and CPU."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.engine import create_ddp_model
from detectron2.utils import comm
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def distributed(model: nn.Module, **options: Any) -> nn.Module:
    """``model`` in DistributedDataParallel where there are several processes, on GPU or CPU.

    Args:
        options: of detectron2's create_ddp_model, fp16_compression for one.
    """
    options = {"broadcast_buffers": False, "find_unused_parameters": False, **options}
    if next(model.parameters()).is_cuda:
        return create_ddp_model(model, **options, device_ids=[torch.cuda.current_device()])
    model = create_ddp_model(model, **options, device_ids=None)
    if not options.get("fp16_compression"):
        _add_in_order(model)
    return model


def _add_in_order(model: nn.Module) -> None:
    """Gradients of three and more processes are added in the order of the processes: a resumed run on a CPU has
    the same bits.

    DistributedDataParallel moves gradients in memory after its first step, and gloo adds those of several
    processes in an order that depends on their place in memory. A sum of two is the same in any order.
    """
    if isinstance(model, DistributedDataParallel) and comm.get_world_size() > 2:
        model.register_comm_hook(None, _mean)


def _mean(_, bucket):  # without annotations: DistributedDataParallel refuses those that are strings
    """A Future of the mean of the processes' gradients in a dist.GradBucket."""
    own = bucket.buffer()
    parts = [torch.empty_like(own) for _ in range(comm.get_world_size())]
    gathered = dist.all_gather(parts, own, async_op=True).get_future()
    return gathered.then(lambda _: torch.stack(parts).sum(dim=0).div_(len(parts)))
