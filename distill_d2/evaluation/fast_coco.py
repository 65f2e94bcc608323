"""COCO's evaluation by faster-coco-eval: the same numbers; import it only where that is installed."""

from __future__ import annotations

from typing import Any

from faster_coco_eval import COCO, COCOeval_faster
from pycocotools.coco import COCO as PythonCOCO


class FastCOCOeval(COCOeval_faster):
    """pycocotools' COCOeval, in C++: same arguments, methods and results, for any limit of detections.

    Images get numbers in place of their ids: faster-coco-eval takes integers only, and makes 7 of '007'."""

    def __init__(self, truth: PythonCOCO, found: PythonCOCO, iou_type: str):
        self._numbers = {key: number for number, key in enumerate(sorted(truth.imgs))}
        super().__init__(
            self._numbered(truth), self._numbered(found), iou_type, print_function=lambda _: None
        )
        self.params.imgIds = sorted(truth.imgs)
        self.params.catIds = sorted(
            truth.cats
        )  # for keypoints it would leave out classes without objects

    def evaluate(self) -> None:
        self.params.imgIds = [self._numbers[key] for key in self.params.imgIds]
        super().evaluate()

    def _numbered(self, coco: PythonCOCO) -> COCO:
        """What is evaluated of these annotations; it is copied, because the evaluation adds to it."""
        content: dict[str, Any] = {"categories": coco.dataset.get("categories", [])}
        content["images"] = [{**image, "id": self._numbers[key]} for key, image in coco.imgs.items()]
        content["annotations"] = [
            {**item, "image_id": self._numbers[item["image_id"]]} for item in coco.anns.values()
        ]
        return COCO(content)
