"""COCO's evaluation, of a detector that detects nothing too."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from typing import Any
from unittest import mock

from detectron2.evaluation import COCOEvaluator, coco_evaluation
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

try:
    from .fast_coco import FastCOCOeval
except ImportError:  # without the extra [coco]
    FastCOCOeval = None  # type: ignore[assignment,misc]

logger = logging.getLogger(__name__)


class COCOEvaluatorOfAny(COCOEvaluator):
    """detectron2's, for which the AP of no detections is 0, as COCO defines it, not nan.

    faster-coco-eval computes the same numbers where it is installed; the log says which code did. What COCO's own
    code prints is logged as details."""

    def evaluate(self, img_ids: Any = None) -> Any:
        # In the dataset's order, whatever the order of the evaluation was.
        places = {key: place for place, key in enumerate(self._coco_api.imgs)}
        self._predictions.sort(key=lambda found: places.get(found["image_id"], len(places)))
        with contextlib.redirect_stdout(io.StringIO()) as printed, _fastest():
            results = super().evaluate(img_ids)
        logger.debug(printed.getvalue())
        return results

    def _derive_coco_results(self, coco_eval: Any, iou_type: str, *args: Any, **kwargs: Any) -> Any:
        if coco_eval is None:
            logger.warning(
                "The model detects nothing in these images, so AP is 0: usual after a few iterations, otherwise a "
                "sign of wrong weights, or of images unlike those of the training"
            )
            coco_eval = _of_no_detections(self._coco_api, iou_type)
        return super()._derive_coco_results(coco_eval, iou_type, *args, **kwargs)


@contextlib.contextmanager
def _fastest() -> Iterator[None]:
    """Inside, detectron2's evaluation uses faster-coco-eval where that is installed; detectron2 has no argument
    for it (its own fast code is one of its extensions, which not every installation has)."""
    if FastCOCOeval is None:
        logger.debug("COCO's evaluation by pycocotools; faster-coco-eval is not installed")
        yield
        return
    logger.debug("COCO's evaluation by faster-coco-eval")
    with mock.patch.multiple(coco_evaluation, COCOeval=FastCOCOeval, COCOevalMaxDets=FastCOCOeval):
        yield


def _of_no_detections(truth: COCO, iou_type: str) -> COCOeval:
    none = COCO()
    none.dataset = {**truth.dataset, "annotations": []}
    none.createIndex()
    evaluation = COCOeval(truth, none, iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation
