"""COCO's AP on resampled test images: how much a gain depends on which images the test set happens to hold."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from .statistics import Interval

_METRIC = re.compile(r"AP(?P<of>50|75|s|m|l|)(?:-(?P<label>.+))?")
_AREAS = {"s": "small", "m": "medium", "l": "large"}
_MOST_NUMBERS = 1 << 24  # of one array


class Metric(NamedTuple):
    """A COCO metric, by detectron2's names: "AP", "AP50", "APs", "AP-dog".

    Attributes:
        iou_type: "bbox", "segm" or "keypoints".
        iou: the one threshold that counts; 0.0: all from 0.50 to 0.95.
        area: of the objects that count, by COCO's label: "all", "small", "medium", "large".
        label: of the one class that counts; "": all.
    """

    iou_type: str
    iou: float
    area: str
    label: str

    @classmethod
    def named(cls, iou_type: str, name: str) -> Metric:
        """Raises ValueError for a name that is none of COCO's average precisions."""
        found = _METRIC.fullmatch(name)
        if found is None or iou_type not in ("bbox", "segm", "keypoints"):
            raise ValueError(
                f"'{iou_type}/{name}' cannot be computed from stored detections; expected bbox, segm or keypoints "
                "with AP, AP50, AP75, APs, APm, APl, or one of these of a class, such as bbox/AP-dog"
            )
        of = found["of"]
        iou = int(of) / 100 if of.isdigit() else 0.0
        return cls(iou_type, iou, _AREAS.get(of, "all"), found["label"] or "")


@dataclass(frozen=True)
class _Class:
    """Matches of one class at all thresholds.

    Attributes:
        images: (D,), int: indices of the images of its detections, by falling score.
        right: (T, D), bool: they find an object.
        counted: (T, D), bool: right or wrong; others found an object that is ignored, such as a crowd.
        ties: (D,), int: the first detection of the same image and score, if it fared otherwise; -1: there is none.
        objects: (images,), int: of this class that are to be found.
    """

    images: np.ndarray
    right: np.ndarray
    counted: np.ndarray
    ties: np.ndarray
    objects: np.ndarray

    def drawn(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Detections as often as ``weights``, (images, draws), says: (E, draws) how often, (T, E) ``right`` and
        ``counted``.

        Copies of a detection follow each other; the second copy of equal scores of an image follows all of them.
        """
        tied = self.ties >= 0
        if not tied.any():
            return weights[self.images], self.right, self.counted
        rows = np.repeat(np.arange(len(tied)), np.where(tied, weights.max(), 1))
        copy = np.arange(len(rows)) - np.searchsorted(rows, rows)
        place = np.where(tied, self.ties, np.arange(len(tied)))[rows]
        order = np.lexsort((rows, copy, place))
        rows, copy = rows[order], copy[order]
        often = weights[self.images[rows]]
        often[tied[rows]] = often[tied[rows]] > copy[tied[rows], None]
        return often, self.right[:, rows], self.counted[:, rows]


@dataclass(frozen=True)
class Matches:
    """Which detections of a run find an object, by COCO's rules. Images do not influence each other, so AP on any
    multiset of them follows without matching again."""

    classes: list[_Class]
    recalls: np.ndarray  # (101,), at which precision is averaged

    def ap(self, weights: np.ndarray) -> np.ndarray:
        """AP in percent on the images taken as often as ``weights`` says, exactly what COCOeval computes on a
        dataset with these copies, which follow each other.

        Args:
            weights: (images, draws), int, 0 or more; images by rising id.

        Returns:
            (draws,), float64; nan where no class has an object.
        """
        total, present = np.zeros((2, weights.shape[1]))
        for part in self.classes:
            value = self._of_class(part, weights)
            there = np.isfinite(value)
            total += np.where(there, value, 0.0)
            present += there
        with np.errstate(invalid="ignore"):
            return 100 * total / present

    def _of_class(self, part: _Class, weights: np.ndarray) -> np.ndarray:
        """(draws,), from 0 to 1; nan without objects."""
        step = max(1, _MOST_NUMBERS // max(1, len(part.images)))
        draws = range(0, weights.shape[1], step)
        return np.concatenate([self._of_draws(part, weights[:, i : i + step]) for i in draws])

    def _of_draws(self, part: _Class, weights: np.ndarray) -> np.ndarray:
        objects = part.objects @ weights
        drawn, all_right, all_counted = part.drawn(weights)
        everything = np.cumsum(drawn, axis=0, dtype=np.int32)
        total = np.zeros(weights.shape[1])
        for right, counted in zip(all_right, all_counted):
            hits = np.flatnonzero(right)
            if not len(hits):
                continue
            found = np.cumsum(drawn[hits], axis=0, dtype=np.int32)
            answers = everything[hits] if counted.all() else _among(drawn, counted, hits)
            total += self._area(found, answers, objects)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(objects > 0, total / (len(self.recalls) * len(part.right)), math.nan)

    def _area(self, found: np.ndarray, answers: np.ndarray, objects: np.ndarray) -> np.ndarray:
        """The sum of the precisions at all recalls.

        Args:
            found, answers: (hits, draws): objects found, and detections made, up to each right detection.
            objects: (draws,)
        """
        precision = found / (answers + np.spacing(1))
        # The best at this recall or a higher one.
        precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
        recall = found / np.maximum(objects, 1)
        reached = np.searchsorted(self.recalls, recall, side="right")
        return np.sum(precision * np.diff(reached, axis=0, prepend=0), axis=0)


def _among(drawn: np.ndarray, counted: np.ndarray, hits: np.ndarray) -> np.ndarray:
    """Detections that count, up to each of ``hits``."""
    sums = np.cumsum(drawn * counted[:, None], axis=0, dtype=np.int32)
    return sums[hits]


def matches_of(
    truth: COCO,
    detections: Sequence[dict[str, Any]],
    metric: Metric,
    *,
    detections_per_image: int = 100,
    keypoint_sigmas: Sequence[float] = (),
) -> Matches:
    """Match a run's detections with the ground truth, as COCOeval does.

    Args:
        detections: COCO's results, as ``coco_instances_results.json`` has them.
        detections_per_image: the best ones of each image and class that count.
        keypoint_sigmas: one per keypoint; empty: COCO's.

    Raises:
        ValueError: no class has the metric's label.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, _loaded(truth, detections, metric.iou_type), metric.iou_type)
        settings = evaluation.params
        if metric.label:
            settings.catIds = _ids_of(truth, metric.label)
        if metric.iou:
            settings.iouThrs = settings.iouThrs[np.isclose(settings.iouThrs, metric.iou)]
        if metric.iou_type != "keypoints":
            settings.maxDets = [detections_per_image]
        if len(keypoint_sigmas):
            settings.kpt_oks_sigmas = np.asarray(keypoint_sigmas)
        chosen = settings.areaRngLbl.index(metric.area)
        settings.areaRng = settings.areaRng[chosen : chosen + 1]
        evaluation.evaluate()
    number = len(settings.imgIds)
    rows = [evaluation.evalImgs[i : i + number] for i in range(0, len(evaluation.evalImgs), number)]
    return Matches([_class_of(row, len(settings.iouThrs)) for row in rows], settings.recThrs)


def _loaded(truth: COCO, detections: Sequence[dict[str, Any]], iou_type: str) -> COCO:
    if not detections:
        none = COCO()
        none.dataset = {**truth.dataset, "annotations": []}
        none.createIndex()
        return none
    items = [dict(item) for item in detections]  # COCO writes into them
    if iou_type == "segm":
        for item in items:
            item.pop("bbox", None)  # else it takes areas from boxes
    return truth.loadRes(items)


def _ids_of(truth: COCO, label: str) -> list[int]:
    names = {item["name"]: item["id"] for item in truth.dataset["categories"]}
    if label not in names:
        raise ValueError(f"the test data have no class '{label}'; their classes are {sorted(names)}")
    return [names[label]]


def _class_of(images: Sequence[dict[str, Any] | None], thresholds: int) -> _Class:
    """From COCOeval's ``evalImgs`` of one class, an entry per image."""
    objects = [0 if item is None else int(np.sum(item["gtIgnore"] == 0)) for item in images]
    known = [(index, item) for index, item in enumerate(images) if item is not None]
    scores = np.array([score for _, item in known for score in item["dtScores"]])
    order = np.argsort(-scores, kind="stable")
    of_images = np.repeat([index for index, _ in known], [len(item["dtScores"]) for _, item in known])
    found, ignored = (
        np.concatenate([np.zeros((thresholds, 0)), *(item[name] for _, item in known)], axis=1)[:, order]
        for name in ("dtMatches", "dtIgnore")
    )
    counted = ignored == 0
    right, of_images = (found != 0) & counted, of_images[order].astype(np.int64)
    ties = _ties(of_images, scores[order], right + 2 * counted)
    return _Class(of_images, right, counted, ties, np.array(objects))


def _ties(images: np.ndarray, scores: np.ndarray, fates: np.ndarray) -> np.ndarray:
    """``ties`` of a class.

    Args:
        fates: (T, D), int: what became of the detections.
    """
    same = (images[1:] == images[:-1]) & (scores[1:] == scores[:-1])
    begins = np.flatnonzero(np.concatenate([[True], ~same]))[: len(images)]
    if len(begins) == len(images):
        return np.full(len(images), -1)
    lowest, highest = (rule.reduceat(fates, begins, axis=1) for rule in (np.minimum, np.maximum))
    sizes = np.diff(begins, append=len(images))
    return np.repeat(np.where((lowest != highest).any(axis=0), begins, -1), sizes)


def image_weights(images: int, draws: int, seed: int = 0) -> np.ndarray:
    """How often each image is in a sample with replacement that is as large as the test set.

    Returns:
        (images, draws), int32; the same for equal arguments.
    """
    generator = np.random.default_rng(seed)
    return generator.multinomial(images, np.full(images, 1 / images), size=draws).T.astype(np.int32)


def bootstrap_gain(
    runs: Sequence[np.ndarray], others: Sequence[np.ndarray], level: float = 0.95
) -> Interval:
    """The percentile interval of the gain of mean AP, for the mean over seeds on test images drawn anew (B. Efron,
    Annals of Statistics 7, 1979).

    Args:
        runs: (draws,) each: the APs of a method's seeds, on the same draws of images.
        others: those of the baseline.
    """
    gains = np.mean(runs, axis=0) - np.mean(others, axis=0)
    gains = gains[np.isfinite(gains)]  # a draw may have no object of a rare kind
    if not len(gains):
        return Interval(math.nan, math.nan, math.nan)
    low, high = np.quantile(gains, [0.5 - level / 2, 0.5 + level / 2])
    beyond = min(np.sum(gains <= 0), np.sum(gains >= 0))
    return Interval(float(low), float(high), float(min(1.0, 2 * (beyond + 1) / (len(gains) + 1))))
