"""Pictures of a training batch as the data mapper gives it: resized and augmented, with its ground truth."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

from ..checkpoint import write_whole
from ..inference.pictures import panel, side_by_side
from ..visualize.job import file_stems

_IMAGES = 16  # of a batch, at most


def draw_batch(
    batch: Sequence[dict[str, Any]], folder: str, input_format: str, classes: Sequence[str]
) -> list[str]:
    """Write a picture of each image of a batch, at most 16, and return their paths.

    Args:
        batch: dicts of the data mapper.
        input_format: "BGR" or "RGB", the order of the images' channels.
        classes: names, by number.

    Raises:
        OSError: a picture cannot be written.
    """
    paths = []
    items = list(batch)[:_IMAGES]
    for item, stem in zip(items, file_stems(items)):
        image = item["image"].clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
        image = image if input_format == "BGR" else image[..., ::-1]
        height, width = image.shape[:2]
        drawn = panel("ground truth", image, _as_detections(item, height, width), classes)
        title = f"{os.path.basename(item['file_name'])}, trained on with {width} x {height} pixels"
        figure = side_by_side([drawn], [title])
        paths.append(os.path.join(folder, f"{stem}_trained_on.png"))
        write_whole(paths[-1], lambda file: figure.savefig(file, format="png"))  # noqa: B023
    return paths


def _as_detections(item: dict[str, Any], height: int, width: int) -> Instances:
    """The ground truth of an image, named as what a detector returns."""
    found = Instances((height, width))
    truth = item.get("instances")
    if truth is None:
        found.pred_boxes, found.pred_classes = Boxes(torch.zeros(0, 4)), torch.zeros(0).long()
        return found
    found.pred_boxes, found.pred_classes = truth.gt_boxes, truth.gt_classes
    if truth.has("gt_masks"):
        masks = truth.gt_masks
        if isinstance(masks, PolygonMasks):
            masks = BitMasks.from_polygon_masks(masks, height, width)
        found.pred_masks = masks.tensor
    if truth.has("gt_keypoints"):
        found.pred_keypoints = truth.gt_keypoints.tensor
    return found
