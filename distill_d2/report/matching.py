"""Which detections of an image find an object, and which objects are missed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_iou

from ..data.sample import objects

_IOU = 0.5
_THRESHOLDS = np.arange(0.05, 0.96, 0.05)


@dataclass(frozen=True)
class Truth:
    """The objects of an image: corners (M, 4), names of classes, masks as the dataset has them or None."""

    boxes: np.ndarray
    classes: list[str]
    masks: list[Any]


@dataclass(frozen=True)
class Found:
    """Detections of an image, by falling score.

    Attributes:
        boxes: (D, 4), corners.
        scores: (D,)
        classes: their names.
        masks: (H, W) each, or None.
        objects: (D,), the index of the object that each one finds, -1 for none. A detection finds the object of
            its class that it overlaps most, by at least 0.5, among those that none of a higher score has found.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: list[str]
    masks: list[Any]
    objects: np.ndarray

    def counts(self, threshold: float) -> tuple[int, int]:
        """(right, wrong) detections with at least this score."""
        shown = self.objects[self.scores >= threshold]
        right = int((shown >= 0).sum())
        return right, len(shown) - right


def truth_of(record: Mapping[str, Any], names: Sequence[str]) -> Truth:
    """The objects of a dataset dict; crowds do not count.

    Args:
        names: of the dataset's classes.
    """
    items = objects(dict(record))
    boxes = [BoxMode.convert(list(item["bbox"]), item["bbox_mode"], BoxMode.XYXY_ABS) for item in items]
    return Truth(
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        classes=[names[item["category_id"]] for item in items],
        masks=[item.get("segmentation") for item in items],
    )


def found_by(instances: Instances, names: Sequence[str], truth: Truth) -> Found:
    """A detector's output, matched with the objects."""
    instances = instances[instances.scores.argsort(descending=True)]
    classes = [names[index] for index in instances.pred_classes.tolist()]
    masks = (
        list(instances.pred_masks.numpy()) if instances.has("pred_masks") else [None] * len(instances)
    )
    overlaps = pairwise_iou(instances.pred_boxes, Boxes(truth.boxes)).numpy()
    matched = np.full(len(instances), -1)
    free = np.ones(len(truth.classes), bool)
    for row, name in enumerate(classes):
        fitting = free & (np.array(truth.classes) == name) & (overlaps[row] >= _IOU)
        if fitting.any():
            matched[row] = int(np.where(fitting, overlaps[row], -1).argmax())
            free[matched[row]] = False
    boxes, scores = instances.pred_boxes.tensor.numpy(), instances.scores.numpy()
    return Found(boxes, scores, classes, masks, matched)


def f1(found: Found, truth: Truth, threshold: float) -> float:
    """Twice the right detections over detections and objects; 1 where there are neither."""
    right, wrong = found.counts(threshold)
    total = right + wrong + len(truth.classes)
    return 2 * right / total if total else 1.0


def best_threshold(found: Sequence[Found], truths: Sequence[Truth]) -> float:
    """The score above which a detector's detections on these images have the highest F1."""
    number = sum(len(truth.classes) for truth in truths)

    def score(threshold: float) -> float:
        counts = [each.counts(threshold) for each in found]
        right = sum(right for right, _ in counts)
        return 2 * right / max(sum(map(sum, counts)) + number, 1)

    return float(max(_THRESHOLDS, key=score))
