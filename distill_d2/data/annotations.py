"""Find what is wrong with the annotations of a dataset's records: classes and boxes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

logger = logging.getLogger(__name__)

_ROTATED = int(BoxMode.XYWHA_ABS)
#: The box modes that detectron2's mappers read, by the length of their boxes.
_LENGTHS = {int(BoxMode.XYXY_ABS): 4, int(BoxMode.XYWH_ABS): 4, _ROTATED: 5}
#: Boxes are taken for corners if this part of them leaves the image by this part of its sides as x, y, width,
#: height, while none does as corners.
_LEAVING, _MARGIN = 0.2, 0.02
_TINY = 4  # pixels of a side


class Annotations:
    """All annotations of a dataset, in arrays of one row each.

    Attributes:
        items: the annotations.
        owners: (N,), int: the index of their record.
        modes: (N,), int: of ``BoxMode``.
    """

    def __init__(self, name: str, dicts: Sequence[dict[str, Any]], counts: list[int]):
        self.name, self.dicts = name, dicts
        self.items = [item for record in dicts for item in record.get("annotations") or ()]
        self.owners = np.repeat(np.arange(len(dicts)), counts)
        for key in ("bbox", "bbox_mode", "category_id"):
            lacking = np.array([item.get(key) is None for item in self.items])
            self._refuse(lacking, f"have no '{key}'", "add it", key)
        modes = [item["bbox_mode"] for item in self.items]
        known = np.array([isinstance(m, (int, np.integer)) and int(m) in _LENGTHS for m in modes])
        advice = "expected BoxMode.XYXY_ABS, XYWH_ABS or XYWHA_ABS"
        self._refuse(~known, "have a bbox_mode that detectron2 does not read", advice, "bbox_mode")
        self.modes = np.array(modes, dtype=np.int64)

    def check(self, num_classes: int | None) -> None:
        """Raises ValueError for wrong classes or boxes."""
        self._check_classes(num_classes)
        sizes = np.array([(record["width"], record["height"]) for record in self.dicts], np.float64)
        for mode in np.unique(self.modes):
            rows = np.flatnonzero(self.modes == mode)
            self._check_boxes(int(mode), rows, sizes[self.owners[rows]])

    def _check_classes(self, num_classes: int | None) -> None:
        labels = [item["category_id"] for item in self.items]
        whole = [
            isinstance(label, (int, np.integer)) or (isinstance(label, float) and label.is_integer())
            for label in labels
        ]
        what = "have a category_id that is not an integer"
        self._refuse(~np.array(whole), what, "convert it", "category_id")
        classes = np.array(labels, dtype=np.int64)
        things = MetadataCatalog.get(self.name).get("thing_classes")
        count = len(things) if things is not None else num_classes
        wrong = (classes < 0) | (classes >= (count or np.inf))
        last = "the number of classes" if count is None else count
        advice = f"classes count from 0 to {last} - 1, in the order of thing_classes in the dataset's metadata"
        self._refuse(wrong, "have a category_id out of range", advice, "category_id")

    def _check_boxes(self, mode: int, rows: np.ndarray, sizes: np.ndarray) -> None:
        """The boxes of one mode, in images of these sizes (N, 2): width, height."""
        boxes = self._numbers(rows, _LENGTHS[mode])
        if mode != BoxMode.XYXY_ABS:  # other modes are converted
            arrays = np.array([not isinstance(self.items[row]["bbox"], (list, tuple)) for row in rows])
            what = f"have a bbox in BoxMode.{BoxMode(mode).name} that is not a list"
            advice = "detectron2 takes an array for several boxes: write bbox.tolist()"
            self._refuse(arrays, what, advice, "bbox", rows)
        wrong = ~np.isfinite(boxes).all(axis=1)
        self._refuse(wrong, "have a box with NaN or inf", "remove or correct them", "bbox", rows)
        if mode == _ROTATED:
            return
        if mode == BoxMode.XYWH_ABS:
            self._refuse_corners(boxes, sizes)
            boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        if (boxes >= 0).all() and boxes.max() <= 1 and sizes.min() > _TINY:
            raise ValueError(
                f"dataset '{self.name}': all {len(rows)} boxes lie between 0 and 1, the first is "
                f"{self._describe(rows[0])}: {list(self.items[rows[0]]['bbox'])}; detectron2 takes them for "
                "pixels. Multiply them by the width and height of the image"
            )
        inside = np.minimum(boxes[:, 2:], sizes) - np.maximum(boxes[:, :2], 0)
        empty = (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)
        outside = ~empty & (inside <= 0).any(axis=1)
        if (empty | outside).all():
            raise ValueError(
                f"dataset '{self.name}': all {len(rows)} boxes are without area ({empty.sum()}) or outside "
                f"their image ({outside.sum()}), the first is {self._describe(rows[0])}: "
                f"{list(self.items[rows[0]]['bbox'])} as BoxMode.{BoxMode(mode).name}"
            )
        for found, what in ((empty, "without area"), (outside, "outside their image")):
            if found.any():
                logger.warning(
                    f"Dataset '{self.name}': {found.sum()} of {len(rows)} boxes are {what} and not trained "
                    f"on, the first is {self._describe(rows[found.argmax()])}"
                )

    def _numbers(self, rows: np.ndarray, length: int) -> np.ndarray:
        """The boxes as (N, length), float64."""
        boxes = [self.items[row]["bbox"] for row in rows]
        try:
            found = np.array(boxes)
        except ValueError:  # of different lengths
            found = np.empty(0)
        if found.dtype.kind not in "iuf" or found.shape != (len(rows), length):
            shapes = [np.array(box, dtype=object) for box in boxes]
            right = [
                box.shape == (length,) and all(isinstance(x, (int, float, np.number)) for x in box)
                for box in shapes
            ]
            what = f"have a box that is not {length} numbers"
            self._refuse(~np.array(right), what, "write numbers", "bbox", rows)
        return found.astype(np.float64)

    def _refuse_corners(self, boxes: np.ndarray, sizes: np.ndarray) -> None:
        """Raises ValueError for boxes that were written as x0, y0, x1, y1 and are read as XYWH."""
        far = boxes[:, :2] + boxes[:, 2:] > sizes * (1 + _MARGIN)
        leaving = far.any(axis=1).sum()
        corners = (boxes[:, 2:] > boxes[:, :2]).all() and (boxes[:, 2:] <= sizes + 1).all()
        if corners and leaving >= max(1, _LEAVING * len(boxes)):
            raise ValueError(
                f"dataset '{self.name}': {leaving} of {len(boxes)} boxes leave their image when they are read "
                "as x, y, width, height (COCO's form), and none does as corners x0, y0, x1, y1: they seem to "
                "be corners. Write [x0, y0, x1 - x0, y1 - y0]; for a COCO json in DATASETS.CUSTOM, the key "
                "BOXES: corners does it; in records of your own, use bbox_mode BoxMode.XYXY_ABS"
            )

    def _refuse(
        self, wrong: np.ndarray, what: str, advice: str, key: str, rows: np.ndarray | None = None
    ) -> None:
        """Raises ValueError if an annotation (of ``rows``, by default all) is wrong: how many, the first with its
        ``key``, and what to do."""
        if not wrong.any():
            return
        first = int(wrong.argmax())
        row = first if rows is None else int(rows[first])
        raise ValueError(
            f"dataset '{self.name}': {wrong.sum()} of {len(wrong)} annotations {what}, the first is "
            f"{self._describe(row)}, {key} {self.items[row].get(key)!r}; {advice}"
        )

    def _describe(self, row: int) -> str:
        owner = int(self.owners[row])
        number = row - int(np.searchsorted(self.owners, owner))
        return f"number {number} (from 0) of {describe_record(self.dicts[owner], owner)}"


def describe_record(record: dict[str, Any], index: int) -> str:
    """Its image, or else its number, for messages."""
    if record.get("file_name") is not None:
        return f"the image '{record['file_name']}'"
    return f"the record {index} (from 0), image_id {record.get('image_id')!r}"
