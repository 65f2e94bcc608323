"""Maps by plain loops, for the tests of several detectors."""

from __future__ import annotations

import numpy as np


def interpolate(level: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear, pixels being areas: (H, W) to (height, width)."""
    source = level.shape
    out = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            v = min(max((y + 0.5) * source[0] / height - 0.5, 0), source[0] - 1)
            u = min(max((x + 0.5) * source[1] / width - 0.5, 0), source[1] - 1)
            top, left = int(v), int(u)
            bottom, right = min(top + 1, source[0] - 1), min(left + 1, source[1] - 1)
            dy, dx = v - top, u - left
            upper = (1 - dx) * level[top, left] + dx * level[top, right]
            lower = (1 - dx) * level[bottom, left] + dx * level[bottom, right]
            out[y, x] = (1 - dy) * upper + dy * lower
    return out
