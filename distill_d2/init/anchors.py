"""Anchors that fit the boxes of a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .boxes import side

#: Of each level, as RetinaNet's: a level's size is twice that of the level below it.
_PER_LEVEL = 3
#: The finest level's first size in units of its stride, and ratios. detectron2's RetinaNet has 4 and the first.
_FACTORS = (2.0, 2.5, 3.2, 4.0, 5.0, 6.3, 8.0)
_USUAL = 4.0
_RATIOS = ((0.5, 1.0, 2.0), (0.7, 1.0, 1.4), (0.35, 0.7, 1.4), (0.7, 1.4, 2.8), (0.33, 1.0, 3.0))
#: From which anchors count as an object's in RetinaNet.
_MATCHED = 0.5
_MOST_BOXES = 5000
_NEGLIGIBLE = 0.02  # of the boxes: finer levels cost time


@dataclass(frozen=True)
class Anchors:
    """Anchors of a pyramid.

    Attributes:
        strides: of its levels, in pixels.
        sizes: square roots of areas, in pixels, of each level.
        ratios: heights divided by widths.
        recall: the share of the boxes that some anchor overlaps with an IoU of 0.5 at least.
        fit: the mean over the boxes of the best IoU.
    """

    strides: tuple[int, ...]
    sizes: tuple[tuple[float, ...], ...]
    ratios: tuple[float, ...]
    recall: float
    fit: float


def fit_anchors(
    corners: np.ndarray, pyramids: Sequence[Sequence[int]], *, usual: bool = False
) -> Anchors:
    """Anchors of the form of RetinaNet's, three sizes and three ratios on each level, for these boxes.

    Args:
        corners: (n, 4), in pixels of the resized image.
        pyramids: the strides of the levels to choose from, the first that is hardly worse than the others.
        usual: whether detectron2's own, which pretrained weights are for, are taken unless they are worse.

    Raises:
        ValueError: there are no boxes.
    """
    if not len(corners):
        raise ValueError("there are no boxes to fit anchors to")
    corners = corners[np.linspace(0, len(corners) - 1, min(len(corners), _MOST_BOXES)).astype(int)]
    tried = [_best(corners, tuple(strides)) for strides in pyramids]
    if usual:
        tried.insert(0, _measured(corners, tuple(pyramids[0]), _USUAL * pyramids[0][0], _RATIOS[0]))
    most = max(anchors.recall for anchors in tried)
    return next(anchors for anchors in tried if anchors.recall >= most - _NEGLIGIBLE)


def _best(corners: np.ndarray, strides: tuple[int, ...]) -> Anchors:
    tried = [
        _measured(corners, strides, factor * strides[0], ratios)
        for factor in _FACTORS
        for ratios in _RATIOS
    ]
    return max(tried, key=lambda anchors: (round(anchors.recall, 2), round(anchors.fit, 2)))


def _measured(
    corners: np.ndarray, strides: tuple[int, ...], first: float, ratios: tuple[float, ...]
) -> Anchors:
    sizes = tuple(
        tuple(
            round(first * stride / strides[0] * 2 ** (step / _PER_LEVEL), 1)
            for step in range(_PER_LEVEL)
        )
        for stride in strides
    )
    best = np.zeros(len(corners))
    for stride, level in zip(strides, sizes):
        shapes = [(size / ratio**0.5, size * ratio**0.5) for size in level for ratio in ratios]
        best = np.maximum(best, _best_iou(corners, stride, np.array(shapes)))
    return Anchors(strides, sizes, ratios, float((best >= _MATCHED).mean()), float(best.mean()))


def _best_iou(corners: np.ndarray, stride: int, shapes: np.ndarray) -> np.ndarray:
    """The best IoU, (n,), of each box with anchors of these widths and heights, (m, 2), at the point of the
    level's grid that is nearest to its center."""
    centers = (corners[:, :2] + corners[:, 2:]) / 2
    points = np.round(centers / stride)[:, None] * stride
    low, high = points - shapes / 2, points + shapes / 2
    overlap = np.minimum(corners[:, None, 2:], high) - np.maximum(corners[:, None, :2], low)
    inside = np.prod(np.maximum(overlap, 0), axis=2)
    union = side(corners)[:, None] ** 2 + np.prod(shapes, axis=1) - inside
    return (inside / union).max(axis=1)
