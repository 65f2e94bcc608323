"""Make a faster copy of a frozen detector that computes the same."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..kernels import in_memory_format, prefer_onednn


def prepared_copy(
    model: nn.Module, memory_format: torch.memory_format, *, heads: bool, tapped: Iterable[str] = ()
) -> nn.Module:
    """A copy of ``model`` with folded norms, the given layout, and, on a CPU, oneDNN's convolutions.

    The copy has modules of its own, and shares with ``model`` every parameter and buffer that it does not
    change. Outputs stay equal within float error.

    Args:
        model: a frozen detector in eval mode, with a ``backbone``.
        memory_format: of the weights.
        heads: whether more than the backbone is prepared.
        tapped: dotted names of modules whose outputs are read: such norms are not folded.
    """
    copied: Any = share_copy(model)
    part = copied if heads else copied.backbone
    fold_norms(part, [copied.get_submodule(path) for path in tapped])
    _use_memory_format(part, memory_format)
    if next(model.parameters()).device.type == "cpu":
        prefer_onednn(part)
    return copied


def share_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules with the same parameters and buffers, not copies of them."""
    return copy.deepcopy(
        model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    )


def fold_norms(model: nn.Module, kept: Sequence[nn.Module] = ()) -> int:
    """Fold every batch norm with fixed statistics, but those in ``kept``, into its convolution, a detectron2
    Conv2d.

    The weights are computed in float64 and replaced, not changed in place. The model must stay in eval
    mode.

    Returns:
        the number of folded norms.
    """
    folded = 0
    for conv in model.modules():
        if isinstance(conv, Conv2d) and _has_fixed_statistics(conv.norm) and conv.norm not in kept:
            _fold(conv)
            folded += 1
    return folded


def _has_fixed_statistics(norm: nn.Module | None) -> bool:
    kinds = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm)
    return isinstance(norm, kinds) and norm.running_var is not None


@torch.no_grad()
def _fold(conv: Conv2d) -> None:
    norm = conv.norm
    weight, bias = fuse_conv_bn_weights(
        conv.weight.double(),
        _double(conv.bias),
        norm.running_mean.double(),
        norm.running_var.double(),
        norm.eps,
        _double(norm.weight),
        _double(norm.bias),
    )
    dtype = conv.weight.dtype
    conv.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    conv.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    conv.norm = None


def _double(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.double()


@torch.no_grad()
def _use_memory_format(model: nn.Module, memory_format: torch.memory_format) -> None:
    """As ``model.to(memory_format=...)``, but tensors of another layout are replaced, not changed."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() in (4, 5):
                tensor = in_memory_format(parameter, memory_format)
                if tensor is not parameter:
                    setattr(module, name, nn.Parameter(tensor, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.dim() in (4, 5):
                setattr(module, name, in_memory_format(buffer, memory_format))
