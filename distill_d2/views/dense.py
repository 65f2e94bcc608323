"""The raw predictions of a one-stage head, in one layout for all detectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, List

import torch


@dataclass(frozen=True)
class DensePredictions:
    """All levels concatenated from fine to coarse; inside a level the order is (H, W, anchor).

    Attributes:
        logits: (N, R, K) class logits before the sigmoid.
        deltas: (N, R, 4) box regression, in the detector's own parametrisation.
        anchors: (R, 4) anchor boxes, absolute XYXY pixels on the padded image.
        level_sizes: number of rows of each level; they add up to R.
        decode: (deltas (..., 4), anchors (..., 4)) -> boxes (..., 4), absolute XYXY.
    """

    logits: torch.Tensor
    deltas: torch.Tensor
    anchors: torch.Tensor
    level_sizes: List[int]
    decode: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def boxes(self) -> torch.Tensor:
        """(N, R, 4) decoded boxes; prefer ``decode`` on the rows that you keep."""
        return self.decode(self.deltas, self.anchors.expand_as(self.deltas))
