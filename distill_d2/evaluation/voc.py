"""Pascal VOC's average precision."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.evaluation.pascal_voc_evaluation import voc_ap
from detectron2.utils import comm

from ..data.voc import VocFolder, VocImage, VocObject, read_annotation

logger = logging.getLogger(__name__)

_THRESHOLDS = range(50, 100, 5)  # intersection over union, in percent
#: VOC's two rules, each by the metric that always follows it; True: that of 2007. Those names have
#: no hyphen, because detectron2 does not print metrics with one, and those of classes have one.
_RULES = {"AP50_11point": True, "AP50_area": False}


class VOCEvaluator(PascalVOCDetectionEvaluator):
    """detectron2's VOC evaluator, with AP50 per class, plain floats, and support for incomplete
    annotations, which detectron2 cannot read.

    The dataset's year chooses the rule: 2007 averages precision at 11 recalls, 2012 takes the area;
    the mean AP50 is reported by both. Matching is detectron2's: each detection, by falling score,
    is compared with the object that it overlaps most. It finds this object if the intersection over
    union exceeds the threshold and no detection found the object before.

    As in training, boxes without area do not count. As in COCO's evaluation, neither does a class
    without objects in the split.
    """

    def evaluate(self, img_ids: Sequence[str] | None = None) -> dict[str, Any]:
        """Compute {"bbox": {"AP", "AP50", "AP75", "AP50_11point", "AP50_area", "AP50-<class>", ...}} in
        percent on the main process, {} on others; nan for a class without objects.

        Args:
            img_ids: of the images that count; None: the whole split.

        Raises:
            ValueError: an annotation cannot be read, or no class has an object.
        """
        gathered = comm.gather(dict(self._predictions), dst=0)
        if not comm.is_main_process():
            return {}
        folder = VocFolder.of_dataset(self._dataset_name)
        ids = folder.ids() if img_ids is None else list(map(str, img_ids))
        images = {key: read_annotation(folder.annotation(key)) for key in ids}
        present = self._classes_present(images, whole=img_ids is None)
        if not present:
            return {}
        precisions = np.full((len(self._class_names), len(_RULES), len(_THRESHOLDS)), np.nan)
        places = {key: place for place, key in enumerate(ids)}
        for index, name in enumerate(self._class_names):
            if name in present:
                lines = [line for part in gathered for line in part.get(index, [])]
                # Their order decides between equal scores; that of the evaluation may be another.
                lines.sort(key=lambda line: places.get(line.rsplit(maxsplit=5)[0], len(places)))
                objects = {
                    key: [item for item in image.objects if item.label == name]
                    for key, image in images.items()
                }
                precisions[index] = average_precisions(lines, objects)
        return OrderedDict(bbox=_summary(precisions, self._class_names, self._is_2007))

    def _classes_present(self, images: dict[str, VocImage], whole: bool) -> set[str]:
        items = [item for image in images.values() for item in image.objects]
        present = {item.label for item in items if not item.difficult} & set(self._class_names)
        if not present and whole:
            raise ValueError(
                f"dataset '{self._dataset_name}' holds no object of {self._class_names} to evaluate with"
            )
        absent = [name for name in self._class_names if name not in present]
        if absent:
            logger.warning(f"{self._dataset_name} has no object of {absent}; AP excludes them")
        return present


def average_precisions(lines: Sequence[str], objects: dict[str, list[VocObject]]) -> np.ndarray:
    """Average precision of one class, as detectron2's ``voc_eval`` computes it.

    Args:
        lines: detections, "image score xmin ymin xmax ymax".
        objects: the objects of each image.

    Returns:
        (rules, thresholds), float64, in percent: by each of _RULES at each of _THRESHOLDS.
    """
    columns = [line.rsplit(maxsplit=5) for line in lines]  # ids may hold spaces
    images = [line[0] for line in columns]
    numbers = np.array([line[1:] for line in columns], dtype=np.float64).reshape(-1, 5)
    order = np.argsort(-numbers[:, 0])  # as detectron2 sorts, which decides between equal scores
    overlap, target = _best_objects([images[index] for index in order], numbers[order, 1:], objects)
    difficult = np.array([item.difficult for items in objects.values() for item in items])
    count = np.sum(~difficult)
    precisions = np.zeros((len(_RULES), len(_THRESHOLDS)))
    for column, threshold in enumerate(_THRESHOLDS):
        hits = np.flatnonzero(overlap > threshold / 100.0)
        hits, ignored = hits[~difficult[target[hits]]], hits[difficult[target[hits]]]
        right = np.zeros(len(lines))
        right[hits[np.unique(target[hits], return_index=True)[1]]] = 1  # each object's first detection
        wrong = 1 - right
        wrong[ignored] = 0
        found = right.cumsum()
        precision = found / np.maximum(found + wrong.cumsum(), np.finfo(np.float64).eps)
        for row, is_2007 in enumerate(_RULES.values()):
            precisions[row, column] = 100.0 * voc_ap(found / count, precision, is_2007)
    return precisions


def _best_objects(
    images: Sequence[str], boxes: np.ndarray, objects: dict[str, list[VocObject]]
) -> tuple[np.ndarray, np.ndarray]:
    """The object that each detection overlaps most.

    Args:
        images: of each detection.
        boxes: (D, 4), their corners.
        objects: of each image.

    Returns:
        intersection over union (D,), -1 in images without objects; index among all objects (D,).
    """
    overlap, target = np.full(len(boxes), -1.0), np.zeros(len(boxes), dtype=np.int64)
    rows: dict[str, list[int]] = {}
    for row, image in enumerate(images):
        rows.setdefault(image, []).append(row)
    first = 0
    for image, items in objects.items():
        if items and image in rows:
            corners = np.array(
                [[round(corner) for corner in item.corners] for item in items], np.float64
            )
            overlaps = _overlaps(boxes[rows[image]], corners)
            overlap[rows[image]] = overlaps.max(axis=1)
            target[rows[image]] = first + overlaps.argmax(axis=1)
        first += len(items)
    return overlap, target


def _overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union (D, M) of boxes (D, 4) and (M, 4), whose last pixels are inside (+ 1)."""
    low = np.maximum(boxes[:, None, :2], others[:, :2])
    high = np.minimum(boxes[:, None, 2:], others[:, 2:])
    common = np.maximum(high - low + 1.0, 0.0).prod(axis=2)
    areas, other_areas = ((part[:, 2:] - part[:, :2] + 1.0).prod(axis=1) for part in (boxes, others))
    return common / (areas[:, None] + other_areas - common)


def _summary(precisions: np.ndarray, names: list[str], is_2007: bool) -> dict[str, float]:
    """Metrics from average precisions (classes, rules, thresholds), by the rule of the year."""
    own = list(_RULES.values()).index(is_2007)
    by_rule = np.nanmean(precisions, axis=0)
    means = by_rule[own]
    metrics = OrderedDict(AP=means.mean(), AP50=means[0], AP75=means[_THRESHOLDS.index(75)])
    metrics.update(zip(_RULES, by_rule[:, 0]))
    for name, values in zip(names, precisions[:, own]):
        metrics[f"AP50-{name}"] = values[0]
    # Plain numbers: checkpoints are read without numpy's.
    return OrderedDict((name, float(value)) for name, value in metrics.items())
