"""The size to which images are resized."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .boxes import Boxes, side

_MULTIPLE = 32  # of the coarsest stride
#: Objects of this many pixels are still found on a level of stride 4 or 8.
_SMALLEST_OBJECT = 16


@dataclass(frozen=True)
class Budget:
    """Longer sides of resized images, in pixels.

    Attributes:
        usual: where objects are large enough; not more than that of the images themselves.
        most: where they are small; likewise.
        least: smaller images are enlarged to this; 0: they are not.
    """

    usual: int
    most: int
    least: int = 0


def choose_size(boxes: Boxes, budget: Budget) -> tuple[int, int]:
    """The shorter and the longer side, in pixels, that images are resized to.

    Args:
        boxes: of training. Objects are small if a tenth of them would have less than 16 pixels.
        budget: what time and memory allow.
    """
    sides = np.sort(boxes.images, axis=1)
    own, shape = np.median(sides[:, 1]), np.median(sides[:, 0] / sides[:, 1])
    fraction = side(boxes.corners) / boxes.images[boxes.owners].max(axis=1)
    needed = _SMALLEST_OBJECT / max(float(np.quantile(fraction, 0.1)), 1e-6)
    long = _rounded(max(min(max(budget.usual, needed), budget.most, own), budget.least))
    return _rounded(long * shape), long


def _rounded(pixels: float) -> int:
    return max(round(pixels / _MULTIPLE), 1) * _MULTIPLE
