"""Images and boxes of a dataset as numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.structures import BoxMode


@dataclass(frozen=True, eq=False)
class Boxes:
    """Images, and the boxes of their objects but crowds.

    Attributes:
        images: (images, 2), float64: widths and heights in pixels.
        corners: (boxes, 4), float64: x0, y0, x1, y1 in pixels.
        owners: (boxes,), int64: indices of the images.
        classes: numbers of boxes by class.
    """

    images: np.ndarray
    corners: np.ndarray
    owners: np.ndarray
    classes: Counter[int]

    @classmethod
    def of(cls, records: Iterable[dict[str, Any]]) -> Boxes:
        """Those of detectron2's dicts."""
        records = list(records)
        corners, owners = [], []
        classes: Counter[int] = Counter()
        for index, record in enumerate(records):
            for item in record.get("annotations", ()):
                if item.get("iscrowd", 0):
                    continue
                corners.append(BoxMode.convert(list(item["bbox"]), item["bbox_mode"], BoxMode.XYXY_ABS))
                owners.append(index)
                classes[item["category_id"]] += 1
        images = np.array([(record["width"], record["height"]) for record in records], np.float64)
        found = np.array(corners, np.float64).reshape(-1, 4)
        return cls(images.reshape(-1, 2), found, np.array(owners, np.int64), classes)

    def resized(self, short: int, long: int) -> np.ndarray:
        """The corners in images that are resized as detectron2 does it: the shorter side to ``short`` pixels,
        unless the longer one exceeded ``long``."""
        sides = self.images[self.owners]
        scale = np.minimum(short / sides.min(axis=1), long / sides.max(axis=1))
        return self.corners * scale[:, None]


def side(corners: np.ndarray) -> np.ndarray:
    """The square roots of the areas of boxes (n, 4)."""
    return np.sqrt(np.prod(np.maximum(corners[:, 2:] - corners[:, :2], 0), axis=1))
