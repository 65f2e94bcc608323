"""Evaluators by a dataset's ``evaluator_type``."""

from __future__ import annotations

import os
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import OrderedDict
from typing import Any, Dict

from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    DatasetEvaluator,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
)
from detectron2.utils import comm


class VOCEvaluator(PascalVOCDetectionEvaluator):
    """detectron2's VOC evaluator, for annotations of other tools too, and with plain floats.

    The dataset's year chooses the rule: 2007 averages precision at 11 recalls, 2012 takes the area.
    """

    def evaluate(self) -> Dict[str, Any]:
        """{"bbox": {"AP", "AP50", "AP75"}} in percent on the main process, {} on others."""
        paths = self._anno_file_template, self._image_set_path
        with tempfile.TemporaryDirectory(prefix="voc_annotations_") as folder:
            if comm.is_main_process():
                self._anno_file_template = os.path.join(folder, "{}.xml")
                self._image_set_path = os.path.join(folder, "images.txt")
                _complete_annotations(*paths, self._anno_file_template, self._image_set_path)
            results = super().evaluate()
        self._anno_file_template, self._image_set_path = paths
        if results is None:
            return OrderedDict()
        return OrderedDict(
            (task, {name: float(value) for name, value in metrics.items()})
            for task, metrics in results.items()
        )


def build_evaluator(dataset_name: str, output_dir: str) -> DatasetEvaluator:
    """The evaluator for a registered dataset; it writes to output_dir/inference/<dataset>.

    Raises:
        ValueError: the dataset's metadata has no ``evaluator_type`` that is known here.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    folder = os.path.join(output_dir, "inference", dataset_name)
    if kind == "coco":
        return COCOEvaluator(dataset_name, output_dir=folder)
    if kind == "pascal_voc":
        return VOCEvaluator(dataset_name)
    if kind == "lvis":
        return LVISEvaluator(dataset_name, output_dir=folder)
    raise ValueError(
        f"dataset '{dataset_name}' has evaluator_type {kind!r} in its metadata; expected 'coco', "
        "'pascal_voc' or 'lvis'"
    )


def _complete_annotations(template: str, image_set: str, new_template: str, new_set: str) -> None:
    """Copy a split's annotations with what detectron2's reader insists on: pose, truncated and
    difficult of each object, whole-numbered corners, and image ids alone on their lines."""
    with open(image_set) as file:
        ids = [line.split()[0] for line in file if line.strip()]
    with open(new_set, "w") as file:
        file.write("\n".join(ids))
    for image_id in ids:
        tree = ElementTree.parse(template.format(image_id))
        for item in tree.iter("object"):
            for key, default in (("pose", "Unspecified"), ("truncated", "0"), ("difficult", "0")):
                if item.find(key) is None:
                    ElementTree.SubElement(item, key).text = default
            for corner in item.find("bndbox"):
                corner.text = str(round(float(corner.text)))
        tree.write(new_template.format(image_id))
