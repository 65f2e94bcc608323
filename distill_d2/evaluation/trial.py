"""Score ground truth as detections before a run, to find what its evaluation cannot use."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Callable

from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.testing import flatten_results_dict

from ..data.sample import objects, varied_sample
from ..quiet import quiet, tell
from .as_detections import as_detections
from .ground_truth import of_records
from .isolation import single_process, work_folder

logger = logging.getLogger(__name__)

#: Images of a trial, and of one with masks, which are slower; images that are searched for a fault.
_IMAGES, _IMAGES_WITH_MASKS, _SEARCHED = 150, 40, 60
#: Objects of an image that COCO's evaluation counts, also those with keypoints.
_MOST_OBJECTS, _MOST_WITH_KEYPOINTS = 100, 20
#: AP in percent: below the first ground truth is not found at all IoUs, below the second at an IoU of 0.5; below
#: the third the evaluation is of no use.
_EXACT, _FOUND, _USELESS = 95.0, 99.9, 50.0
_SKIP = "DATASETS.CHECK none skips this check"


def try_evaluator(
    name: str,
    records: Sequence[dict[str, Any]],
    build: Callable[[str], DatasetEvaluator],
    *,
    masks: bool = False,
    keypoints: bool = False,
) -> set[str]:
    """Give a dataset's ground truth as detections to the evaluator of the run, which must not fail and must find
    all objects; a sample of at most 150 images. What it finds at fault but usable is logged.

    Evaluators without the argument ``img_ids`` of COCOEvaluator.evaluate score small datasets only.

    Args:
        name: of the dataset.
        records: its detectron2 dicts.
        build: the evaluator, for a folder that it may write to.
        masks, keypoints: of the detector's predictions.

    Returns:
        the names of the evaluator's metrics, such as "bbox/AP"; none where it was not tried.

    Raises:
        ImportError: a package that the evaluator needs is missing.
        ValueError: the evaluator fails, or finds less than half of the ground truth; the message names the
            image and the objects.
    """
    with quiet(), single_process(), work_folder(name) as folder:
        sample = _sample(records, masks, keypoints)
        with _told(name), of_records(sample):
            built = build(folder)
        whole = len(sample) == len(records)
        return {
            metric
            for evaluator in getattr(built, "_evaluators", [built])
            for metric in _Trial(name, evaluator, sample, whole, masks, keypoints).run()
        }


@dataclass
class _Trial:
    """One evaluator and the images that it scores."""

    name: str
    evaluator: Any
    sample: list[dict[str, Any]]
    whole: bool
    masks: bool
    keypoints: bool

    def run(self) -> list[str]:
        """The names of the metrics."""
        if not self.sample or not (self.whole or self._takes_images()):
            return []
        try:
            results = self._score(self.sample)
        except Exception as error:  # an evaluator may raise anything
            raise _failure(self.name, error, self._unknown_ids() or self._failing()) from error
        if not results and not any(record.get("annotations") for record in self.sample):
            _warn(f"dataset '{self.name}' has no annotations: its detections will not be scored")
        for task, metrics in results.items():
            if isinstance(metrics, dict) and "AP" in metrics:
                ap = float(metrics["AP"])
                self._judge(task, ap, float(metrics.get("AP50", ap)))
        return list(flatten_results_dict(results))

    def _judge(self, task: str, ap: float, ap50: float) -> None:
        if math.isnan(ap50) or ap50 < 0:
            if self.whole or any(map(objects, self.sample)):
                _warn(
                    f"dataset '{self.name}' has no object that the evaluation of {task} scores: AP will be nan"
                )
        elif ap50 < _FOUND:
            text = (
                f"dataset '{self.name}': its own ground truth, given to its evaluator as detections, has AP50 "
                f"{ap50:.1f} instead of 100 for {task}, which no detector can exceed"
                f"{self._objects_at_fault(task)}{self._unmapped()}; {_SKIP}"
            )
            if ap50 < _USELESS:
                raise ValueError(text)
            _warn(text)
        elif ap < _EXACT:
            _warn(
                f"dataset '{self.name}': its own ground truth, given to its evaluator as detections, has AP50 100 "
                f"but AP {ap:.1f} for {task}: the evaluator reads or rounds its boxes differently"
            )

    def _score(self, records: Sequence[dict[str, Any]], only: int | None = None) -> dict[str, Any]:
        self.evaluator.reset()
        for record in records:
            inputs = {key: value for key, value in record.items() if key != "annotations"}
            found = as_detections(record, self.masks, self.keypoints)
            self.evaluator.process([inputs], [{"instances": found if only is None else found[[only]]}])
        if self.whole and len(records) == len(self.sample):
            return self.evaluator.evaluate() or {}
        return self.evaluator.evaluate(img_ids=[record["image_id"] for record in records]) or {}

    def _takes_images(self) -> bool:
        return "img_ids" in inspect.signature(self.evaluator.evaluate).parameters

    # What is at fault.

    def _first(self, at_fault: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
        """The first image that is at fault when it is scored alone."""
        if not self._takes_images():
            return None
        return next(filter(at_fault, self.sample[:_SEARCHED]), None)

    def _failing(self) -> str:
        record = self._first(self._fails)
        return f"; scored alone, the first image that fails is {_where(record)}" if record else ""

    def _unknown_ids(self) -> str:
        """Which images the dataset's json lacks; "" if none, or if there is no json."""
        known = getattr(getattr(self.evaluator, "_coco_api", None), "imgs", None)
        absent = [
            record["image_id"] for record in self.sample if record["image_id"] not in (known or ())
        ]
        if not known or not absent:
            return ""
        json_file = MetadataCatalog.get(self.name).get("json_file")
        return (
            f"; {len(absent)} of {len(self.sample)} image_ids are not in its json_file {json_file!r}, such as "
            f"{absent[0]!r}, while the json has {next(iter(known))!r}"
        )

    def _fails(self, record: dict[str, Any]) -> bool:
        try:
            self._score([record])
        except Exception:
            return True
        return False

    def _ap50(self, task: str, record: dict[str, Any], only: int | None = None) -> float:
        try:
            metrics = self._score([record], only).get(task, {})
        except Exception:  # an evaluator may raise anything; here it cannot use this image alone
            return 0.0
        return metrics.get("AP50", metrics.get("AP", math.nan))

    def _objects_at_fault(self, task: str) -> str:
        record = self._first(lambda record: self._ap50(task, record) < _FOUND)
        if record is None:
            return ""
        items = objects(record)
        lost = [item for i, item in enumerate(items) if not self._ap50(task, record, i) > 0]
        listed = ", ".join(f"{self._label(item)} at {_rounded(item['bbox'])}" for item in lost[:3])
        found = [f": {len(lost)} of its {len(items)} objects are not found: {listed}"] if lost else []
        of_json = self._annotations_of_json(record, lost)
        return "; ".join([f". The first image at fault is {_where(record)}" + "".join(found), *of_json])

    def _annotations_of_json(self, record: dict[str, Any], lost: Sequence[dict[str, Any]]) -> list[str]:
        """The ids of the annotations in a COCO json that the dataset lacks, or that are ``lost``."""
        coco = getattr(self.evaluator, "_coco_api", None)
        if coco is None:
            return []
        items = [item for item in coco.imgToAnns.get(record["image_id"], []) if not item.get("iscrowd")]
        known = [_rounded(item["bbox"]) for item in objects(record)]
        gone = [_rounded(item["bbox"]) for item in lost]
        ids = [
            item["id"]
            for item in items
            if _rounded(item["bbox"]) not in known or _rounded(item["bbox"]) in gone
        ]
        return [f"the annotations with ids {ids[:10]} are concerned"] if ids else []

    def _unmapped(self) -> str:
        """Whether the ids of a json's categories are taken for numbers of classes."""
        ids = sorted(getattr(getattr(self.evaluator, "_coco_api", None), "cats", ()))
        if not ids or ids == list(range(len(ids))):
            return ""
        if MetadataCatalog.get(self.name).get("thing_dataset_id_to_contiguous_id"):
            return ""
        return (
            f". The categories of its json have the ids {ids[:5]}, not 0, 1, ...: its metadata needs "
            "thing_dataset_id_to_contiguous_id, {id: number of the class}"
        )

    def _label(self, item: dict[str, Any]) -> str:
        names, number = MetadataCatalog.get(self.name).get("thing_classes") or [], item["category_id"]
        return f"'{names[number]}'" if 0 <= number < len(names) else f"class {number}"


def _sample(records: Sequence[dict[str, Any]], masks: bool, keypoints: bool) -> list[dict[str, Any]]:
    """A varied sample without images of which an evaluation does not find all of the ground truth: those of more
    objects than it counts, and equal boxes of one class, of which VOC's finds one."""
    most = _MOST_WITH_KEYPOINTS if keypoints else _MOST_OBJECTS
    count = _IMAGES_WITH_MASKS if masks else _IMAGES
    return [
        record
        for record in varied_sample(records, count)
        if len(objects(record)) <= most and not _has_equal_boxes(record)
    ]


def _has_equal_boxes(record: dict[str, Any]) -> bool:
    boxes = [(item.get("category_id"), *map(float, item.get("bbox", ()))) for item in objects(record)]
    return len(set(boxes)) < len(boxes)


def _rounded(box: Sequence[float]) -> list[float]:
    return [round(float(number), 1) for number in box]


def _where(record: dict[str, Any]) -> str:
    return f"'{record.get('file_name')}' (id {record.get('image_id')!r})"


def _failure(name: str, error: Exception, place: str = "") -> Exception:
    if isinstance(error, ImportError):
        return ImportError(
            f"dataset '{name}': its evaluator needs a Python package that is not installed: {error}. Install it, "
            "or set DATASETS.TEST to datasets that need none",
            name=error.name,
        )
    text = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
    return ValueError(
        f"dataset '{name}' cannot be evaluated: its evaluator, given the ground truth as detections, fails: "
        f"{text}{place}. Correct the annotations; {_SKIP}"
    )


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # an evaluator may raise anything
        raise _failure(name, error) from error


def _warn(text: str) -> None:
    tell(logger, text[0].upper() + text[1:])
