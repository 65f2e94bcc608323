"""How much a split detector sends per image, beside its AP."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

if TYPE_CHECKING:
    from .stage import BottleneckStage


class TransmittedBytes(DatasetEvaluator):
    """Mean size of what a BottleneckStage sends for one image of a dataset."""

    def __init__(self, stage: BottleneckStage):
        self._stage = stage
        self.reset()

    def reset(self) -> None:
        self._images = 0
        self._numbers = 0

    def process(self, inputs: list[dict[str, Any]], outputs: Any) -> None:
        self._images += len(inputs)
        self._numbers += self._stage.transmitted.numel()

    def evaluate(self) -> dict[str, dict[str, float]]:
        """{"bytes_per_image": {"raw", "16bit", "8bit"}} on the main process, {} on others.

        raw is float32. The numbers alone: in 8 bits each image also needs its scale and zero point.
        """
        counts = comm.gather((self._images, self._numbers), dst=0)
        if not comm.is_main_process():
            return {}
        images, numbers = (sum(column) for column in zip(*counts))
        mean = numbers / max(images, 1)
        return {"bytes_per_image": OrderedDict([("raw", 4 * mean), ("16bit", 2 * mean), ("8bit", mean)])}
