"""The size to which images are resized."""

from __future__ import annotations

import numpy as np

from .boxes import Boxes, side

_MULTIPLE = 32  # of the coarsest stride
#: Objects of this many pixels are still found on a level of stride 4 or 8.
_SMALLEST_OBJECT = 16


def choose_size(boxes: Boxes, longest: int, most: int) -> tuple[int, int]:
    """The shorter and the longer side, in pixels, that images are resized to.

    The longer side is ``longest``, more if a tenth of the objects would be smaller than 16 pixels, at most
    ``most``; and not more than that of the images themselves.

    Args:
        boxes: of training.
        longest, most: what the budget allows.
    """
    sides = np.sort(boxes.images, axis=1)
    own, shape = np.median(sides[:, 1]), np.median(sides[:, 0] / sides[:, 1])
    fraction = side(boxes.corners) / boxes.images[boxes.owners].max(axis=1)
    needed = _SMALLEST_OBJECT / max(float(np.quantile(fraction, 0.1)), 1e-6)
    long = _rounded(min(max(longest, needed), most, own))
    return _rounded(long * shape), long


def _rounded(pixels: float) -> int:
    return max(round(pixels / _MULTIPLE), 1) * _MULTIPLE
