"""Areas, boxes and forms of COCO's masks: polygons, and RLE, which is run lengths or their compressed text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util


def compressed(rle: dict[str, Any]) -> dict[str, Any]:
    """An RLE as pycocotools computes with it."""
    return mask_util.frPyObjects(rle, *rle["size"]) if isinstance(rle["counts"], list) else rle


def area(item: dict[str, Any]) -> float:
    """Of an annotation in COCO's form: of its mask, or else of its box."""
    mask = item.get("segmentation")
    if isinstance(mask, dict):
        return float(mask_util.area(compressed(mask)))
    if mask:
        return float(sum(map(_polygon_area, mask)))
    return float(item["bbox"][2] * item["bbox"][3])


def _polygon_area(polygon: Sequence[float]) -> float:
    """By the shoelace formula."""
    points = list(zip(polygon[::2], polygon[1::2]))
    following = [*points[1:], points[0]]
    return 0.5 * abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(points, following)))


def box_of_mask(mask: Any) -> list[float]:
    """x, y, width, height."""
    if isinstance(mask, dict):
        return mask_util.toBbox(compressed(mask)).tolist()
    points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in mask])
    low, high = points.min(axis=0), points.max(axis=0)
    return [*low.tolist(), *(high - low).tolist()]


def is_rle(mask: dict[str, Any]) -> bool:
    """Whether its runs fill the image; pycocotools waits forever for those that do not."""
    size, counts = mask.get("size"), mask.get("counts")
    if not isinstance(size, list) or [type(edge) for edge in size] != [int, int]:
        return False
    if isinstance(counts, list):
        return all(type(run) is int and run >= 0 for run in counts) and sum(counts) == math.prod(size)
    return isinstance(counts, str)


def flat_polygons(mask: list) -> list[list]:
    """Lists of numbers [x, y, ...] of a mask that is one, or has pairs [x, y] in it."""
    if not isinstance(mask[0], list):
        return [mask]
    if len(mask) >= 3 and all(isinstance(each, list) and len(each) == 2 for each in mask):
        return [list(itertools.chain(*mask))]
    return [
        list(itertools.chain(*each)) if each and isinstance(each[0], list) else each for each in mask
    ]
