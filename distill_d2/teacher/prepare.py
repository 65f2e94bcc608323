"""Make a faster copy of a frozen detector that computes the same."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d as TorchvisionFrozenBatchNorm2d

from ..kernels import in_memory_format, prefer_onednn
from .sole_readers import sole_readers

#: Classes of timm by name, because it is not imported for models of others. Its norms have an activation.
_TIMM_CONVS = ("timm.layers.conv2d_same.Conv2dSame",)
_TIMM_NORMS = tuple(
    f"timm.layers.norm_act.{name}"
    for name in ("BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d")
)


def prepared_copy(
    model: nn.Module,
    memory_format: torch.memory_format,
    *,
    heads: bool,
    tapped: Iterable[str] = (),
    probe_size: tuple[int, int] = (64, 64),
) -> nn.Module:
    """A copy of ``model`` with folded norms, the given layout, and, on a CPU, oneDNN's convolutions.

    The copy has modules of its own, and shares with ``model`` every parameter and buffer that it does not
    change. Outputs stay equal within float error.

    Args:
        model: a frozen detector in eval mode, with a ``backbone``.
        memory_format: of the weights.
        heads: whether more than the backbone is prepared.
        tapped: dotted names of modules whose outputs are read: such norms are not folded.
        probe_size: (H, W) in pixels of an image that the backbone takes, to find norms that are no part of their
            convolution.
    """
    copied: Any = share_copy(model)
    part = copied if heads else copied.backbone
    kept = [copied.get_submodule(path) for path in tapped]
    fold_norms(part, kept)
    fold_separate_norms(copied, probe_size, kept)
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
            _fold(conv, conv.norm)
            conv.norm = None
            folded += 1
    return folded


def fold_separate_norms(
    model: nn.Module, probe_size: tuple[int, int], kept: Sequence[nn.Module] = ()
) -> int:
    """Fold batch norms with fixed statistics that are modules of their own, as timm has them, into convolutions
    whose output nobody else reads; an activation that is part of the norm takes its place.

    Args:
        model: a frozen detector in eval mode, whose ``backbone`` is run once on a black image. Only its norms are
            folded.
        probe_size: (H, W) of that image in pixels.
        kept: modules whose outputs are read.

    Returns:
        the number of folded norms.
    """
    backbone: Any = model.backbone
    modules = list(backbone.modules())
    convs = [m for m in modules if type(m) is nn.Conv2d or _name(m) in _TIMM_CONVS]
    inside = {m.norm for m in modules if isinstance(m, Conv2d)}
    norms = [m for m in modules if _is_separate_norm(m) and m not in inside]
    if not convs or not norms:
        return 0
    weight = convs[0].weight
    channels = getattr(model, "pixel_mean", torch.zeros(3)).numel()
    image = torch.zeros(1, channels, *probe_size, device=weight.device, dtype=weight.dtype)
    replaced = {}
    for conv, norm in sole_readers(backbone, image, convs, norms, kept):
        _fold(conv, norm)
        replaced[norm] = _rest_of(norm).eval()
    for module in modules:
        for name, child in list(module.named_children()):
            if child in replaced:
                setattr(module, name, replaced[child])
    return len(replaced)


def _has_fixed_statistics(norm: nn.Module | None) -> bool:
    kinds = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm)
    return isinstance(norm, kinds) and norm.running_var is not None


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _is_separate_norm(module: nn.Module) -> bool:
    """Of a class whose computation is known; a subclass may compute more."""
    known = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d, TorchvisionFrozenBatchNorm2d)
    if type(module) not in known and _name(module) not in _TIMM_NORMS:
        return False
    return getattr(module, "running_var", None) is not None


def _rest_of(norm: nn.Module) -> nn.Module:
    """What a norm computes beyond the normalization."""
    if _name(norm) not in _TIMM_NORMS:
        return nn.Identity()
    parts: Any = norm
    return parts.act if isinstance(parts.drop, nn.Identity) else nn.Sequential(parts.drop, parts.act)


@torch.no_grad()
def _fold(conv: Any, norm: Any) -> None:
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
