"""The memory layout of weights, and the kernels that a CPU uses for convolutions of one pixel."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer


class FastKernels:
    """A model that is trained computes with weights in channels_last and, on a CPU, with oneDNN's kernels, until
    ``undo``.

    Results are equal within float rounding. The parameters stay the same objects, for their optimizer; make this
    before DistributedDataParallel, which remembers layouts. Until ``undo`` a copy of the model has the same layout
    and dilations, which change no output; checkpoints have neither.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._dilations = [(conv, conv.dilation) for conv in _pointwise(model)]
        _use_layout(model, torch.channels_last)
        if next(model.parameters()).device.type == "cpu":
            prefer_onednn(model)

    def undo(self) -> None:
        """The model as it was, with the weights that it has now."""
        for conv, dilation in self._dilations:
            conv.dilation = dilation
        _use_layout(self._model, torch.contiguous_format)


def prefer_onednn(model: nn.Module) -> int:
    """Let oneDNN compute the 1x1 convolutions on a CPU, too.

    With one thread and less than 16 images torch computes them as a matrix product instead, which is a
    tenth slower where oneDNN has kernels of its own (x86 with AVX2 or more). It does not do so with a
    dilation, which changes nothing in a kernel of one pixel, whatever its stride, padding and groups.

    Returns:
        the number of layers changed.
    """
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return 0
    convs = _pointwise(model)
    for conv in convs:
        conv.dilation = (2, 2)
    return len(convs)


def in_memory_format(tensor: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """The tensor (N, C, H, W) itself if it has this layout; the same memory, or a copy, with these strides."""
    strides = torch.empty_like(tensor, device="meta", memory_format=memory_format).stride()
    if tensor.stride() == strides:
        return tensor
    if tensor.is_contiguous(memory_format=memory_format):  # a kernel of one pixel has every layout
        return tensor.detach().as_strided(tensor.shape, strides)
    return tensor.detach().to(memory_format=memory_format)


def plain_layout(value: Any) -> Any:
    """Nested dicts, lists and tuples whose tensors in channels_last are contiguous copies; all else is shared.
    Tensors of one memory have one copy."""
    copies: dict[Any, torch.Tensor] = {}

    def convert(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if not _is_channels_last(value):
                return value
            place = (value.data_ptr(), value.shape, value.stride(), value.dtype)
            return copies.setdefault(place, in_memory_format(value, torch.contiguous_format))
        if isinstance(value, dict):
            changed = copy.copy(value)  # of the same class, with its attributes
            changed.update((key, convert(item)) for key, item in value.items())
            return changed
        if type(value) in (list, tuple):
            return type(value)(map(convert, value))
        return value

    return convert(value)


def follow_layout(optimizer: Optimizer) -> None:
    """Give an optimizer's state, as momentum, the layout of its parameters; a checkpoint's is plain."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                if value.stride() != parameter.stride():
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _pointwise(model: nn.Module) -> list[nn.Conv2d]:
    """The 1x1 convolutions."""
    return [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]


def _is_channels_last(tensor: torch.Tensor) -> bool:
    return (
        tensor.dim() == 4
        and tensor.layout is torch.strided
        and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def _use_layout(model: nn.Module, memory_format: torch.memory_format) -> None:
    """As ``model.to(memory_format=...)``, which leaves the strides of 1x1 kernels as they are."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:
            tensor.data = in_memory_format(tensor.data, memory_format)
