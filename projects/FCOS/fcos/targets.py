"""FCOS' targets: which location of which level predicts which object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.structures import Boxes, Instances


class Points(NamedTuple):
    """The R locations of all levels, from fine to coarse, row by row.

    Attributes:
        centers: (R, 2) x, y in pixels.
        strides: (R,) of their level, in pixels.
        ranges: (R, 2) smallest and largest of the longest distances to a side, of their level.
        levels: (R,) int64 index of their level.
    """

    centers: torch.Tensor
    strides: torch.Tensor
    ranges: torch.Tensor
    levels: torch.Tensor


class Targets(NamedTuple):
    """What R locations of N images should predict.

    Attributes:
        classes: (N, R) int64; K where a location is background.
        ltrb: (N, 4, R) distances to the object's sides in strides; where there is none, any one's.
        objects: (N, R) int64: which of its image's objects; of background any.
        positive: (N, R) bool.
    """

    classes: torch.Tensor
    ltrb: torch.Tensor
    objects: torch.Tensor
    positive: torch.Tensor


class FCOSAssigner:
    """Objects belong to locations near their centers, on the level of their size; of several objects the
    smallest (arXiv 2006.09214, section 3.1 and "center sampling")."""

    def __init__(self, sizes_of_interest: Sequence[float], radius: float | None):
        """
        Args:
            sizes_of_interest: the longest distance to a side in pixels that belongs to each level but
                the last.
            radius: half the side of the central region in strides; None: all of the box.
        """
        bounds = [-1.0, *map(float, sizes_of_interest), 1e8]
        self.bounds = list(zip(bounds, bounds[1:]))
        self.radius = radius

    def points(self, anchors: Sequence[Boxes]) -> Points:
        """The centers of squares of their stride's size, per level."""
        squares = torch.cat([level.tensor for level in anchors])
        counts = [len(level) for level in anchors]
        lowest, highest, levels = (
            torch.cat([squares.new_full((n,), value) for n, value in zip(counts, values)])
            for values in (*zip(*self.bounds), range(len(counts)))
        )
        return Points(
            centers=(squares[:, :2] + squares[:, 2:]) / 2,
            strides=squares[:, 2] - squares[:, 0],
            ranges=torch.stack([lowest, highest], dim=1),
            levels=levels.long(),
        )

    @torch.no_grad()
    def targets(self, points: Points, gt_instances: Sequence[Instances], num_classes: int) -> Targets:
        """Of N images; objects' centers are "gt_centers" (G, 2), x and y in pixels, where an image has
        them, and otherwise those of their boxes."""
        found = [_image_targets(self, points, image, num_classes) for image in gt_instances]
        return Targets(*map(torch.stack, zip(*found)))

    def assign(
        self,
        points: Points,
        boxes: torch.Tensor,
        valid: torch.Tensor | None = None,
        centers: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            boxes: (G, 4) absolute XYXY, G at least 1.
            valid: (G,) bool, which of them are there; None: all.
            centers: (G, 2); None: of the boxes.

        Returns:
            (R,) int64 index of the box of each location, and (R,) bool whether it has one.
        """
        low, high = boxes.unsqueeze(-1).split(2, dim=1)  # (G, 2, 1)
        x = points.centers.t()
        near, far = x - low, high - x  # (G, 2, R)
        if self.radius is None:
            inside = torch.minimum(near, far)
        else:
            middle = (low + high) / 2 if centers is None else centers.unsqueeze(-1)
            reach = self.radius * points.strides
            inside = torch.minimum(
                x - torch.maximum(middle - reach, low), torch.minimum(middle + reach, high) - x
            )
        longest = torch.maximum(near, far).amax(dim=1)
        smallest, largest = points.ranges.unbind(dim=1)
        fits = (inside.amin(dim=1) > 0) & (longest >= smallest) & (longest <= largest)
        if valid is not None:
            fits &= valid[:, None]
        area = Boxes(boxes).area().unsqueeze(-1)
        best, index = torch.where(fits, area, torch.inf).min(dim=0)
        return index, best < torch.inf


def _image_targets(
    assigner: FCOSAssigner, points: Points, objects: Instances, num_classes: int
) -> tuple[torch.Tensor, ...]:
    boxes, classes = objects.gt_boxes.tensor.float(), objects.gt_classes
    count = len(points.strides)
    if not len(boxes):
        index = torch.zeros(count, dtype=torch.int64, device=boxes.device)
        background = torch.full_like(index, num_classes)
        return background, boxes.new_zeros(4, count), index, torch.zeros_like(index, dtype=torch.bool)
    centers = objects.gt_centers if objects.has("gt_centers") else None
    index, positive = assigner.assign(points, boxes, centers=centers)
    low, high = boxes[index].split(2, dim=1)
    ltrb = torch.cat([points.centers - low, high - points.centers], dim=1) / points.strides[:, None]
    background = torch.full_like(index, num_classes)
    return torch.where(positive, classes[index], background), ltrb.t(), index, positive
