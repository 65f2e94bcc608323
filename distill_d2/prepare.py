"""Make a frozen detector faster without changing what it computes."""

from __future__ import annotations

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import nn


def fold_norms(model: nn.Module) -> int:
    """Fold every frozen or evaluating batch norm of detectron2's Conv2d into it, in place.

    y = (Wx + b - mean) * scale + shift  becomes  (scale W) x + (b - mean) scale + shift,
    computed in float64. Returns the number of folded layers. The model must stay in eval mode.
    """
    folded = 0
    for conv in model.modules():
        if isinstance(conv, Conv2d) and _scale(conv.norm) is not None:
            _fold(conv)
            folded += 1
    return folded


def prefer_onednn(model: nn.Module) -> int:
    """Have oneDNN compute the 1x1 convolutions on a CPU too; the number of layers changed.

    With one thread and less than 16 images torch sends them to a matrix product instead, which is a
    tenth slower where oneDNN has kernels of its own (x86 with AVX2 or more). It does not for dilated
    ones, and a dilation changes nothing in a kernel of one pixel.
    """
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return 0
    found = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    for conv in found:
        conv.dilation = (2, 2)
    return len(found)


def native_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` computes bfloat16 itself rather than emulating it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    # Private names, so guarded; mkldnn's own check also says yes where oneDNN only emulates.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)


def _scale(norm: nn.Module | None) -> torch.Tensor | None:
    """The factor per channel, in float64, of a norm with fixed statistics; None for others."""
    fixed = isinstance(norm, (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm))
    if not fixed or norm.running_var is None:
        return None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    return scale if norm.weight is None else scale * norm.weight.double()


@torch.no_grad()
def _fold(conv: Conv2d) -> None:
    norm, scale = conv.norm, _scale(conv.norm)
    bias = -norm.running_mean.double() if conv.bias is None else conv.bias.double() - norm.running_mean
    shift = 0.0 if norm.bias is None else norm.bias.double()
    conv.weight.copy_(conv.weight.double() * scale.view(-1, 1, 1, 1))
    conv.bias = nn.Parameter((bias * scale + shift).to(conv.weight.dtype), requires_grad=False)
    conv.norm = None
