"""Evaluators by a dataset's ``evaluator_type``."""

from __future__ import annotations

import os

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    COCOEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
)
from torch import nn

from .voc import VOCEvaluator

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
        ValueError: there is none, or an unknown one.
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
        ValueError: the dataset's metadata has no known ``evaluator_type``.
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
    """``evaluator`` together with the evaluators of the model's modules: those with a method
    ``evaluator()`` return one."""
    methods = [getattr(module, "evaluator", None) for module in model.modules()]
    own = [method() for method in methods if callable(method)]
    return DatasetEvaluators([evaluator, *own]) if own else evaluator
