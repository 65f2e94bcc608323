"""The same bits from a process that goes on and from one that resumes, on a CPU."""

from __future__ import annotations

import contextlib

import torch


def exact_torchscript(device: str) -> contextlib.AbstractContextManager:
    """TorchScript functions compute the same bits in their first calls and later, on a CPU.

    TorchScript optimizes a function after its first calls, and then rounds otherwise: the process that
    resumes a run would differ from the one that went on. A GPU repeats no bits anyway, and its fused
    kernels save memory.
    """
    if torch.device(device).type != "cpu":
        return contextlib.nullcontext()
    return torch.jit.optimized_execution(False)
