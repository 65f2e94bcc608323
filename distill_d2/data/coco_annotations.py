"""Correct the masks, boxes and numbers of a COCO json's annotations."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from .coco_content import CocoContent
from .coco_masks import area, box_of_mask, flat_polygons, is_rle

_LARGEST_ID = 2**63 - 1  # of detectron2's evaluation in C++


def mend_annotations(found: CocoContent, corners: bool) -> None:
    """Correct all that pycocotools needs of annotations.

    Args:
        corners: whether the boxes are x0, y0, x1, y1.

    Raises:
        ValueError: one cannot be corrected.
    """
    ignored = [item for item in found.annotations if item.get("ignore")]
    advice = "detectron2 does not support it: set iscrowd 1 instead, or remove them"
    found.refuse(ignored, "have 'ignore'", "ignore", advice)
    _mend_masks(found)
    _mend_boxes(found, corners)
    _mend_ids(found)
    _mend_crowds(found)
    _mend_areas(found)
    _mend_keypoints(found)


def _mend_masks(found: CocoContent) -> None:
    """Polygons nested otherwise or of fewer than three points; as in detectron2, an instance without another
    polygon is dropped, but its box stays where no annotation has a mask."""
    masks = [item for item in found.annotations if item.get("segmentation")]
    wrong = [item for item in masks if not _is_mask(item["segmentation"])]
    found.refuse(
        wrong,
        "have a wrong mask",
        "segmentation",
        "expected polygons, or an RLE: a size of height and width, and counts: a text, or a list whose sum is the "
        "number of pixels",
    )
    nested, shortened, without = 0, 0, set()
    for item in masks:
        mask = item["segmentation"]
        if isinstance(mask, dict):
            continue
        polygons = flat_polygons(mask)
        nested += polygons != mask
        right = [each for each in polygons if len(each) >= 6 and not len(each) % 2 and _are_finite(each)]
        shortened += len(polygons) - len(right)
        item["segmentation"] = right
        if not right:
            without.add(id(item))
    found.note(nested, "{} polygons of another nesting were flattened")
    found.note(shortened, "{} polygons of fewer than 3 points, or not of numbers, were ignored")
    if len(without) < len(masks):
        kept = (id(item) not in without for item in found.annotations)
        found.keep(kept, "dropped {} annotations without another polygon")


def _is_mask(mask: Any) -> bool:
    return is_rle(mask) if isinstance(mask, dict) else isinstance(mask, list)


def _are_finite(values: Iterable[Any]) -> bool:
    """Whether all are finite numbers."""
    try:
        return all(map(math.isfinite, values))
    except TypeError:
        return False


def _mend_boxes(found: CocoContent, corners: bool) -> None:
    """Boxes from masks where they lack; those without area are dropped."""
    lacking = [item for item in found.annotations if item.get("bbox") in (None, [], "")]
    neither = [item for item in lacking if not item.get("segmentation")]
    found.refuse(neither, "have neither a bbox nor a mask", "bbox", "remove them")
    for item in lacking:
        item["bbox"] = box_of_mask(item["segmentation"])
    found.note(len(lacking), "{} boxes were missing, those of the masks are used")
    boxes = _as_array(found)
    wrong = [item for item, row in zip(found.annotations, np.isfinite(boxes).all(axis=1)) if not row]
    found.refuse(wrong, "have a box with NaN or inf", "bbox", "remove or correct them")
    if corners:
        from_masks = set(map(id, lacking))
        rows = [id(item) not in from_masks for item in found.annotations]
        boxes[rows, 2:] -= boxes[rows, :2]
        for item, box in zip(found.annotations, boxes.tolist()):
            item["bbox"] = box
    found.keep((boxes[:, 2:].min(axis=1) > 0).tolist(), "dropped {} boxes without area")


def _as_array(found: CocoContent) -> np.ndarray:
    """All boxes, (N, 4), float64."""
    items = found.annotations
    try:
        boxes = np.array([item["bbox"] for item in items])
    except ValueError:  # of different lengths
        boxes = np.empty(0)
    if boxes.dtype.kind not in "iuf" or boxes.shape != (len(items), 4):
        numbers = [_four_numbers(item["bbox"]) for item in items]
        wrong = [item for item, box in zip(items, numbers) if box is None]
        found.refuse(wrong, "have a wrong box", "bbox", "expected 4 numbers")
        for item, box in zip(items, numbers):
            item["bbox"] = box
        found.changes.append("boxes of text were read as numbers")
        boxes = np.array(numbers)
    return boxes.astype(np.float64)


def _four_numbers(box: Any) -> list[float] | None:
    try:
        numbers = [float(number) for number in box]
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == 4 else None


def _mend_ids(found: CocoContent) -> None:
    ids = [item.get("id") for item in found.annotations]
    if all(type(i) is int and 0 < i <= _LARGEST_ID for i in ids) and len(set(ids)) == len(ids):
        return
    for number, item in enumerate(found.annotations, 1):
        item["id"] = number
    found.note(
        len(ids),
        "annotation ids were missing, repeated, too large or below 1 (evaluation would take those for missed): "
        "{} were numbered from 1",
    )


def _mend_crowds(found: CocoContent) -> None:
    lacking = [item for item in found.annotations if item.get("iscrowd") not in (0, 1)]
    wrong = [item for item in lacking if item.get("iscrowd") not in (None, "", "0", "1")]
    found.refuse(wrong, "have a wrong iscrowd", "iscrowd", "expected 0 or 1")
    for item in lacking:
        item["iscrowd"] = int(item.get("iscrowd") or 0)
    found.note(len(lacking), "{} iscrowd were missing or not numbers (missing: 0)")


def _mend_areas(found: CocoContent) -> None:
    lacking = [item for item in found.annotations if not _is_area(item.get("area"))]
    for item in lacking:
        item["area"] = area(item)
    found.note(len(lacking), "{} areas were missing, those of the masks or boxes are used")


def _is_area(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _mend_keypoints(found: CocoContent) -> None:
    items = [item for item in found.annotations if item.get("keypoints")]
    wrong = [item for item in items if not _are_finite(item["keypoints"])]
    advice = "expected x, y, visibility, ..."
    found.refuse(wrong, "have keypoints that are not numbers", "keypoints", advice)
    lacking = [item for item in items if type(item.get("num_keypoints")) is not int]
    for item in lacking:
        item["num_keypoints"] = sum(visible > 0 for visible in item["keypoints"][2::3])
    found.note(len(lacking), "{} num_keypoints were missing and are counted")
