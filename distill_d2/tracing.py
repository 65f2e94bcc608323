"""Sizes while a model's computations are recorded, for ``distill_d2.export``."""

from __future__ import annotations

from typing import Any

import torch


def is_recorded() -> bool:
    """Whether torch.jit.trace, torch.export or torch.onnx records what is computed."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def at_most(count: Any, limit: int) -> Any:
    """The smaller one; torch.jit.trace has tensors for sizes, and a comparison would be recorded as a constant."""
    return count.clamp(max=limit) if isinstance(count, torch.Tensor) else min(count, limit)
