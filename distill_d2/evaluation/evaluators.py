"""Evaluators by a dataset's ``evaluator_type``."""

from __future__ import annotations

import logging
import os
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import OrderedDict
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
)
from detectron2.evaluation.pascal_voc_evaluation import parse_rec, voc_ap, voc_eval
from detectron2.utils import comm
from torch import nn

from ..data.voc import VocImage, read_annotation, read_split

logger = logging.getLogger(__name__)

_THRESHOLDS = range(50, 100, 5)  # intersection over union, in percent
#: VOC's two rules, each by the metric that always follows it; True: that of 2007. Those names have
#: no hyphen, because detectron2 does not print metrics with one, and those of classes have one.
_RULES = {"AP50_11point": True, "AP50_area": False}


class VOCEvaluator(PascalVOCDetectionEvaluator):
    """detectron2's VOC evaluator, with AP50 per class, plain floats, and for annotations of other
    tools too, which may lack what detectron2's reader insists on.

    The dataset's year chooses the rule: 2007 averages precision at 11 recalls, 2012 takes the area;
    the mean AP50 is reported by both. Matching is detectron2's: each detection, by falling score,
    meets the object that it overlaps most. It finds it if the intersection over union, in pixels
    with the last one of a box counting (+ 1), exceeds the threshold and no detection found it before.

    As in training, boxes without area do not count; as in COCO's evaluation, neither does a class
    of which the split holds no object.
    """

    def evaluate(self) -> dict[str, Any]:
        """{"bbox": {"AP", "AP50", "AP75", "AP50_11point", "AP50_area", "AP50-<class>", ...}} in
        percent on the main process, {} on others; nan for a class without objects.

        Raises:
            ValueError: an annotation cannot be read, or no class has an object.
        """
        predictions = self._gather_predictions()
        if not comm.is_main_process():
            return {}
        ids = read_split(self._image_set_path)
        images = {key: read_annotation(self._anno_file_template.format(key)) for key in ids}
        present = self._classes_present(images)
        precisions = np.full((len(self._class_names), len(_RULES), len(_THRESHOLDS)), np.nan)
        with tempfile.TemporaryDirectory(prefix="voc_eval_") as folder:
            paths = _write_annotations(images, folder)
            for index, name in enumerate(self._class_names):
                if name in present:
                    precisions[index] = self._class_precisions(predictions[index], name, *paths)
        parse_rec.cache_clear()  # it would keep every evaluation's annotations for ever
        return OrderedDict(bbox=_summary(precisions, self._class_names, self._is_2007))

    def _classes_present(self, images: dict[str, VocImage]) -> set[str]:
        items = [item for image in images.values() for item in image.objects]
        present = {item.label for item in items if not item.difficult} & set(self._class_names)
        if not present:
            raise ValueError(
                f"'{self._image_set_path}' holds no object of {self._class_names} to evaluate with"
            )
        absent = [name for name in self._class_names if name not in present]
        if absent:
            logger.warning(f"{self._dataset_name} has no object of {absent}; AP leaves them out")
        return present

    def _gather_predictions(self) -> dict[int, list[str]]:
        """{class index: its detections as lines of text} of all processes, on the main one."""
        gathered = comm.gather(dict(self._predictions), dst=0)
        return {
            index: [line for part in gathered for line in part.get(index, [])]
            for index in range(len(self._class_names))
        }

    def _class_precisions(
        self, lines: list[str], name: str, template: str, image_set: str
    ) -> list[list[float]]:
        """Average precision of one class, in percent, by each of _RULES at each of _THRESHOLDS."""
        with tempfile.NamedTemporaryFile("w", suffix=".txt", dir=os.path.dirname(image_set)) as file:
            file.write("\n".join(lines))
            file.flush()
            curves = [
                voc_eval(file.name, template, image_set, name, ovthresh=threshold / 100.0)[:2]
                for threshold in _THRESHOLDS
            ]
        return [[100.0 * voc_ap(*curve, is_2007) for curve in curves] for is_2007 in _RULES.values()]


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


def _write_annotations(images: dict[str, VocImage], folder: str) -> tuple[str, str]:
    """Write annotations with all that detectron2's reader insists on: pose, truncated and difficult
    of each object, whole-numbered corners, and image ids alone on their lines.

    Returns:
        what ``voc_eval`` takes: a template of the xml files' paths, and the file of image ids.
    """
    template, image_set = os.path.join(folder, "{}.xml"), os.path.join(folder, "images.txt")
    with open(image_set, "w", encoding="utf-8") as file:
        file.write("\n".join(images))
    for key, image in images.items():
        root = ElementTree.Element("annotation")
        for item in image.objects:
            element = ElementTree.SubElement(root, "object")
            box = ElementTree.SubElement(element, "bndbox")
            fields = {"name": item.label, "pose": "", "truncated": "0"}
            fields["difficult"] = str(int(item.difficult))
            for tag, text in fields.items():
                ElementTree.SubElement(element, tag).text = text
            for tag, corner in zip(("xmin", "ymin", "xmax", "ymax"), item.corners):
                ElementTree.SubElement(box, tag).text = str(round(corner))
        ElementTree.ElementTree(root).write(template.format(key), encoding="utf-8")
    return template, image_set


_COCO_LIKE = {
    "coco": COCOEvaluator,
    "lvis": LVISEvaluator,
}
_OTHERS = {
    "cityscapes_instance": CityscapesInstanceEvaluator,
    "pascal_voc": VOCEvaluator,
}


def evaluator_kind(dataset_name: str) -> str:
    """The ``evaluator_type`` in a registered dataset's metadata.

    Raises:
        ValueError: there is none, or none that is known here.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind in _COCO_LIKE or kind in _OTHERS:
        return kind
    raise ValueError(
        f"dataset '{dataset_name}' has evaluator_type {kind!r} in its metadata; expected one of "
        f"{sorted([*_COCO_LIKE, *_OTHERS])}"
    )


def build_evaluator(dataset_name: str, output_dir: str) -> DatasetEvaluator:
    """The evaluator for a registered dataset; COCO's and LVIS's write their detections to
    output_dir/inference/<dataset>.

    Raises:
        ValueError: the dataset's metadata has no ``evaluator_type`` that is known here.
    """
    kind = evaluator_kind(dataset_name)
    if kind in _OTHERS:
        return _OTHERS[kind](dataset_name)
    json_file = MetadataCatalog.get(dataset_name).get("json_file")
    if json_file and "://" not in json_file and not os.path.exists(json_file):
        DatasetCatalog.get(dataset_name)  # generated on first use, or the loader's error says why not
    folder = os.path.join(output_dir, "inference", dataset_name)
    return _COCO_LIKE[kind](dataset_name, output_dir=folder)


def with_model_evaluators(evaluator: DatasetEvaluator, model: nn.Module) -> DatasetEvaluator:
    """``evaluator``, and those of modules of ``model`` that have something of their own to report: each
    module with a method ``evaluator()`` returns one."""
    own = [module.evaluator() for module in model.modules() if hasattr(module, "evaluator")]
    return DatasetEvaluators([evaluator, *own]) if own else evaluator
