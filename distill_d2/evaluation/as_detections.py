"""Ground truth in the form in which a detector returns its detections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools import mask as rle

from ..data.coco_masks import compressed
from ..data.sample import has, objects


def as_detections(record: dict[str, Any], masks: bool, keypoints: bool) -> Instances:
    """The objects of a record that are not crowds, with equal scores.

    Args:
        record: detectron2's dict.
        masks, keypoints: whether the detector predicts them.

    Returns:
        ``pred_boxes``, ``scores`` and ``pred_classes`` of N objects, ``pred_masks`` (N, H, W), uint8, and
        ``pred_keypoints`` (N, K, 3).
    """
    items, size = objects(record), (record.get("height", 0), record.get("width", 0))
    boxes = [BoxMode.convert(list(item["bbox"]), item["bbox_mode"], BoxMode.XYXY_ABS) for item in items]
    found = Instances(size)
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    found.scores = torch.ones(len(items))
    found.pred_classes = torch.tensor([item["category_id"] for item in items], dtype=torch.int64)
    if masks:
        drawn = [_mask(item.get("segmentation"), *size) for item in items]
        found.pred_masks = torch.from_numpy(np.stack(drawn)) if drawn else torch.zeros(0, *size)
    if keypoints:
        points = [_points(item, box) for item, box in zip(items, boxes)]
        found.pred_keypoints = torch.tensor(points, dtype=torch.float32).reshape(len(items), -1, 3)
    return found


def _points(item: dict[str, Any], box: Sequence[float]) -> list[float]:
    """The keypoints of an object; the center of the box (XYXY) for each, where none is labeled."""
    points = list(item["keypoints"]) if has(item, "keypoints") else [0.0] * 51
    if any(points[2::3]):
        return points
    return [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2, 0.0] * (len(points) // 3)


def _mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """A mask (height, width), uint8; zeros for an object without."""
    if isinstance(segmentation, np.ndarray):
        return segmentation.astype(np.uint8)
    if not segmentation:
        return np.zeros((height, width), np.uint8)
    if isinstance(segmentation, dict):
        return rle.decode(compressed(segmentation))
    return rle.decode(rle.merge(rle.frPyObjects(segmentation, height, width)))
