"""Describe query slots by numbers: class, position and rough scale."""

from __future__ import annotations

import math

import torch

from .sampling import SCALE_BINS, Queries

_POSITION_DIM = 128  # per axis, for every hidden dimension
_TEMPERATURE = 10000.0


def descriptor_dim(classes: int, with_scale: bool) -> int:
    """Length of a descriptor."""
    return classes + 2 * _POSITION_DIM + (2 * SCALE_BINS if with_scale else 0)


def describe(queries: Queries, classes: int, with_scale: bool) -> torch.Tensor:
    """Descriptors (N, K, descriptor_dim), float32: class one-hot, sine encodings of x and y and,
    ``with_scale``, one-hot bins of width and height. Padded slots are class 0 at 0, without bins."""
    parts = [_one_hot(queries.classes, classes), _encode(queries.points)]
    if with_scale:
        bins = _one_hot(queries.scales, SCALE_BINS).flatten(-2)
        parts.append(bins * (1 - queries.is_padding[..., None]))
    return torch.cat(parts, dim=-1)


def _one_hot(values: torch.Tensor, size: int) -> torch.Tensor:
    # Not F.one_hot: that waits for the device to check the values.
    return (values[..., None] == torch.arange(size, device=values.device)).to(values.dtype)


def _encode(points: torch.Tensor) -> torch.Tensor:
    """(..., 2) to (..., 256): per axis 64 sines, then 64 cosines."""
    index = torch.arange(_POSITION_DIM // 2, device=points.device)
    period = _TEMPERATURE ** (2 * index / _POSITION_DIM)
    angle = points[..., None] * (2 * math.pi) / period
    return torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2)
