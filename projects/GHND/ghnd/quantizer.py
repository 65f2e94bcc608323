"""What is sent between the two halves of a split detector: fewer bits per number, and their bytes."""

from __future__ import annotations

from typing import NamedTuple

import torch

LEVELS = 255


class Quantized(NamedTuple):
    """A tensor (N, ...) in 8 bits: scale * (values - zero_point).

    Attributes:
        values: uint8, of the tensor's shape.
        scale, zero_point: float32, (N, 1, ...) per image, or (1, 1, ...); zero points are whole.
    """

    values: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """The tensor again, float32."""
        return self.scale * (self.values.float() - self.zero_point)


def quantize(tensor: torch.Tensor, *, reference_bugs: bool = False) -> Quantized:
    """Affine 8-bit quantization (Matsubara and Levorato, ICPR 2020, after Jacob et al., CVPR 2018).

    Each image has a range of its own, from its smallest to its largest number and widened to 0, so
    that every number returns within half a step of the scale, for all signs; a constant returns
    exactly, except for float32's rounding.

    Args:
        tensor: (N, ...), floating point.
        reference_bugs: as the reference implementation: one range for all images, not widened to 0,
            and a truncated zero point. Numbers of one sign, some distance from 0, then saturate, a
            constant returns as 0, and zeros alone as nan.
    """
    tensor = tensor.float()
    over = tuple(range(0 if reference_bugs else 1, tensor.dim()))
    low, high = tensor.amin(over, keepdim=True), tensor.amax(over, keepdim=True)
    if reference_bugs:
        scale = (high - low) / LEVELS
        zero_point = (-low / scale).clamp(0, LEVELS).trunc()
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / LEVELS
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero_point = (-low / scale).round()
    values = (zero_point + tensor / scale).clamp(0, LEVELS).round()
    return Quantized(values.to(torch.uint8), scale, zero_point)


def rounded(tensor: torch.Tensor, bits: int, *, reference_bugs: bool = False) -> torch.Tensor:
    """The tensor (N, ...) as it arrives when it is sent in 8 or 16 bits per number; 0: unchanged."""
    if bits == 8:
        return quantize(tensor, reference_bugs=reference_bugs).dequantize().to(tensor.dtype)
    return tensor.half().to(tensor.dtype) if bits == 16 else tensor
