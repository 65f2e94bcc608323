"""Evaluators by a dataset's ``evaluator_type``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
)
from torch import nn

from ..data import check_name
from .coco import COCOEvaluatorOfAny
from .ground_truth import load_annotations, with_ground_truth
from .voc import VOCEvaluator

_COCO_LIKE = {
    "coco": COCOEvaluatorOfAny,
    "lvis": LVISEvaluator,
}
#: Detections of an image that the official evaluations count.
_LIMITS = {"coco": 100, "lvis": 300}
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


def build_evaluator(
    dataset_name: str,
    output_dir: str,
    *,
    detections_per_image: int = 100,
    keypoint_sigmas: Sequence[float] = (),
) -> DatasetEvaluator:
    """The evaluator for a registered dataset; COCO's and LVIS's write their detections to
    output_dir/inference/<dataset>.

    Args:
        detections_per_image: the best ones of each image that count, in place of COCO's 100 and LVIS's 300
            where it is more than these: TEST.DETECTIONS_PER_IMAGE.
        keypoint_sigmas: of the object keypoint similarity, one per keypoint; empty: COCO's
            (https://cocodataset.org/#keypoints-eval): TEST.KEYPOINT_OKS_SIGMAS.

    Raises:
        ValueError: the dataset's metadata has no known ``evaluator_type``.
    """
    check_name(dataset_name, "the list of test datasets")
    kind = evaluator_kind(dataset_name)
    if kind in _OTHERS:
        return _OTHERS[kind](dataset_name)
    load_annotations(dataset_name)
    folder = os.path.join(output_dir, "inference", dataset_name)
    options: dict[str, Any] = {"output_dir": folder}
    if detections_per_image > _LIMITS[kind]:
        options["max_dets_per_image"] = detections_per_image
    if kind == "coco":
        options["kpt_oks_sigmas"] = list(keypoint_sigmas)
        dataset_name = with_ground_truth(dataset_name, folder)
    return _COCO_LIKE[kind](dataset_name, **options)


def with_model_evaluators(evaluator: DatasetEvaluator, model: nn.Module) -> DatasetEvaluator:
    """``evaluator`` together with the evaluators of the model's modules: those with a method
    ``evaluator()`` return one."""
    methods = [getattr(module, "evaluator", None) for module in model.modules()]
    own = [method() for method in methods if callable(method)]
    return DatasetEvaluators([evaluator, *own]) if own else evaluator
