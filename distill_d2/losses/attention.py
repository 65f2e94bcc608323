"""Where, and in which channels, a feature map is large: the attention of FGD and FBKD."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable


class _AbsoluteMeans(torch.autograd.Function):
    """The means of |x| over channels (N, H, W), and over cells (N, C); keeps x alone for the gradient."""

    @staticmethod
    def forward(ctx, feature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(feature)
        absolute = feature.abs()
        return absolute.mean(dim=1), absolute.mean(dim=(2, 3))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_cells: torch.Tensor, grad_channels: torch.Tensor):
        (feature,) = ctx.saved_tensors
        _, channels, height, width = feature.shape
        of_cells, of_channels = grad_cells / channels, grad_channels / (height * width)
        return feature.sign().mul_(of_cells[:, None] + of_channels[..., None, None])


def attentions(feature: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The spatial and the channel attention of a map (N, C, H, W), float32.

    Returns:
        H W softmax over cells of (mean over channels of |x|) / temperature, (N, H, W);
        C softmax over channels of (mean over cells of |x|) / temperature, (N, C).
    """
    cells, channels = _AbsoluteMeans.apply(feature)
    return _spatial(cells, temperature), channels.shape[1] * (channels / temperature).softmax(dim=1)


def spatial_attention(feature: torch.Tensor, temperature: float) -> torch.Tensor:
    """The first of ``attentions`` alone."""
    return _spatial(feature.abs().mean(dim=1), temperature)


def _spatial(cells: torch.Tensor, temperature: float) -> torch.Tensor:
    flat = (cells / temperature).flatten(1)
    return (flat.shape[1] * flat.softmax(dim=1)).view_as(cells)
