"""Which locations predict which objects: qualities and the two assignments (sections 3.2 and 3.4).

The objects are G of one image, the locations all R of its levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from detectron2.structures import Boxes, pairwise_point_box_distance

from distill_d2.upload import upload


class Pairs(NamedTuple):
    """M locations and the objects that they predict: indices (M,) int64 of the image, of the location in
    it, and of the object among those of all images."""

    images: torch.Tensor
    rows: torch.Tensor
    objects: torch.Tensor


def match_quality(logits: torch.Tensor, iou: torch.Tensor, alpha: float) -> torch.Tensor:
    """p^(1 - alpha) IoU^alpha.

    Args:
        logits: (G, R) of the objects' classes; iou: (G, R) of the objects and the predicted boxes.
    """
    quality = logits.sigmoid() ** (1 - alpha) * iou**alpha
    # NaN: neither box has an area, or a prediction is NaN, and then the loss stops the trainer.
    return quality.nan_to_num(nan=0.0)


def inside(boxes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """(G, R) bool: which centers of anchors (R, 4) are inside boxes (G, 4)."""
    distances = pairwise_point_box_distance(Boxes(anchors).get_centers(), Boxes(boxes))
    return (distances.amin(dim=-1) > 0).t()


def near_center(boxes: torch.Tensor, anchors: torch.Tensor, radius: float) -> torch.Tensor:
    """(G, R) bool: which centers of anchors (R, 4), squares with their strides as sides, are inside
    boxes (G, 4) and, in x and in y, less than ``radius`` strides from the centers of these."""
    centers = Boxes(boxes).get_centers()[:, None]
    distances = (Boxes(anchors).get_centers() - centers).abs().amax(dim=-1)
    return inside(boxes, anchors) & (distances < radius * (anchors[:, 2] - anchors[:, 0]))


def one_to_one(qualities: Sequence[torch.Tensor]) -> Pairs:
    """Give each object a location of its own, such that the sum of the qualities is the largest.

    Args:
        qualities: N of (G, R), one for each image. The host waits once for all of them.

    Raises:
        ImportError: scipy is not installed.
    """
    # A best assignment is found among each object's G best locations: were an object given another one,
    # then one of its G best would be free, and not worse. So only these go to the host, those of all
    # images together. The sort is stable, to choose among equal ones as if all were there: the first.
    best = [quality.sort(dim=1, descending=True, stable=True) for quality in qualities]
    parts = [part[:, : len(part)] for pair in best for part in pair]
    packed = torch.cat([part.double().flatten() for part in parts]).cpu().numpy()
    split = np.split(packed, np.cumsum([part.numel() for part in parts])[:-1])
    split = [numbers.reshape(part.shape) for numbers, part in zip(split, parts)]
    found, before = [], 0
    for image, (values, locations) in enumerate(zip(split[::2], split[1::2])):
        objects, rows = best_assignment(values, locations.astype(np.int64))
        found.append(np.stack([np.full_like(rows, image), rows, before + objects]))
        before += len(values)
    return Pairs(*upload(torch.from_numpy(np.concatenate(found, axis=1)), qualities[0].device))


def best_assignment(values: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give different columns to rows, such that the sum of their values is the largest.

    Args:
        values: (G, B) of each row in its columns (G, B) int64; it can have no other.

    Returns:
        the rows and their columns, int64.
    """
    if values.size == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError(f"the training of POTO needs scipy: pip install scipy ({error})") from error
    used, places = np.unique(columns, return_inverse=True)
    table = np.full((len(values), len(used)), -np.inf)
    np.put_along_axis(table, places.reshape(columns.shape), values, axis=1)
    rows, places = linear_sum_assignment(table, maximize=True)
    return rows, used[places]


def one_to_many(
    quality: torch.Tensor, allowed: torch.Tensor, sizes: Sequence[int], topk: int
) -> torch.Tensor:
    """The assignment of the auxiliary loss, as that of ATSS (arXiv 1912.02424).

    An object's candidates are the ``topk`` best locations of each level; it has those whose quality
    reaches the mean plus the standard deviation over all of them. If several objects
    claim a location, it gets the one with the highest quality.

    Args:
        quality: (G, R); allowed: (G, R) bool, which locations an object can have.
        sizes: number of locations of each level; they add up to R.

    Returns:
        (R,) int64: the object of each location; -1: none.
    """
    if len(quality) == 0:
        return torch.full(quality.shape[1:], -1, device=quality.device)
    chosen = [_highest(level, topk) for level in quality.split(sizes, dim=1)]
    values = torch.cat([best for best, _ in chosen], dim=1)
    limit = values.mean(dim=1, keepdim=True) + values.std(dim=1, keepdim=True)
    positive = torch.cat([mask for _, mask in chosen], dim=1) & allowed & (quality >= limit)
    highest, objects = torch.where(positive, quality, -1.0).max(dim=0)
    return torch.where(highest >= 0, objects, -1)


def _highest(level: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest values of each row of a level (G, P): (G, count), or as many as there are; and where
    they are, (G, P) bool."""
    values, columns = level.topk(min(count, level.shape[1]), dim=1)
    return values, torch.zeros_like(level, dtype=torch.bool).scatter(1, columns, True)
