"""SOLOv2's losses (arXiv 2003.10152, section 3.3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fvcore.nn import sigmoid_focal_loss_jit

from .targets import ImageTargets


def class_loss(logits: torch.Tensor, classes: torch.Tensor, alpha: float, gamma: float) -> torch.Tensor:
    """Focal loss of all cells, divided by the number of cells with an object, plus one.

    Args:
        logits: (N, R, K); classes: (N, R) int64, K where a cell has no object.
    """
    num_classes = logits.shape[-1]
    target = classes[..., None] == torch.arange(num_classes, device=classes.device)
    focal = sigmoid_focal_loss_jit(logits, target.to(logits.dtype), alpha, gamma, reduction="sum")
    return focal / ((classes < num_classes).sum() + 1)


def mask_loss(
    kernels: torch.Tensor, features: torch.Tensor, targets: Sequence[ImageTargets]
) -> torch.Tensor:
    """The mean dice loss of all entries; 0 without any.

    Args:
        kernels: (N, R, D) of all cells; features: (N, D, H, W).
        targets: of N images, with masks (G, H, W).
    """
    total = (kernels.sum() + features.sum()) * 0.0
    count = torch.zeros_like(total)
    for kernel, feature, image in zip(kernels, features, targets):
        if not len(image.cell):
            continue
        masks = predict_masks(kernel[image.cell], feature)
        losses = dice_loss(masks, image.masks[image.object])
        total = total + torch.where(image.valid, losses, 0.0).sum()
        count = count + image.valid.sum()
    return total / count.clamp(min=1)


def predict_masks(kernels: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
    """The masks (E, H, W), from 0 to 1, that kernels (E, D) make of one image's features (D, H, W)."""
    return (kernels @ feature.flatten(1)).sigmoid().unflatten(1, feature.shape[1:])


def dice_loss(masks: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """1 - 2 sum(p t) / (sum(p^2) + sum(t^2)), of each mask.

    Args:
        masks: (E, H, W), from 0 to 1; target: (E, H, W) bool.

    Returns:
        (E,).
    """
    p, t = masks.flatten(1), target.flatten(1).to(masks.dtype)
    common = (p * t).sum(dim=1)
    return 1 - 2 * common / ((p.square().sum(dim=1) + 1e-3) + (t.sum(dim=1) + 1e-3))
