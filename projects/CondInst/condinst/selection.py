"""Select the positive locations that have a mask loss."""

from __future__ import annotations

import torch


def random_subset(count: int, most: int, device: torch.device) -> torch.Tensor:
    """Sorted indices of at most ``most`` of ``count`` instances, drawn at random."""
    if count <= most:
        return torch.arange(count, device=device)
    return torch.randperm(count, device=device)[:most].sort().values


def best_of_each_object(
    images: torch.Tensor, objects: torch.Tensor, scores: torch.Tensor, per_image: int
) -> torch.Tensor:
    """Sorted indices of the best instances of each object: max(per_image // n, 1) of each of an image's
    n objects.

    Args:
        images, objects: (M,) int64, index of the image, and of the object in it.
        scores: (M,).
    """
    if not len(images):
        return images
    groups = images * (objects.max() + 1) + objects
    order = scores.argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]
    ordered = groups[order]
    rank = torch.arange(len(order), device=order.device) - torch.searchsorted(ordered, ordered)
    found = torch.zeros(int(images.max()) + 1, dtype=torch.int64, device=order.device)
    found = found.index_add(0, images[order], (rank == 0).long())
    allowed = (per_image // found.clamp(min=1)).clamp(min=1)
    return order[rank < allowed[images[order]]].sort().values
