"""What an exported detector finds, beside what the model itself finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

Outputs = Sequence[np.ndarray]

#: The largest differences of a detection that counts as found again: boxes and keypoints in pixels, masks as a
#: share of their area, or of 100 pixels where that is smaller.
LIMITS = {"boxes": 1.0, "scores": 1e-3, "masks": 0.02, "keypoints": 2.0}
#: The largest share of detections that are not found again, as scores and overlaps close to a threshold may be on
#: its other side.
LOST = 0.01


@dataclass
class Differences:
    """Of an exported detector on some images.

    Attributes:
        images: their number; detections: that of the model; lost: how many of both have no partner.
        largest: difference of partners, by output.
    """

    images: int = 0
    detections: int = 0
    lost: int = 0
    largest: dict[str, float] = field(default_factory=dict)

    @property
    def within_limits(self) -> bool:
        return self.lost <= LOST * self.detections

    def __str__(self) -> str:
        units = {"boxes": " px", "keypoints": " px", "masks": " of the area"}
        parts = [f"{name} {value:.1g}{units.get(name, '')}" for name, value in self.largest.items()]
        found = f"{self.images} images, {self.detections} detections, {self.lost} not found again"
        return f"{found}; largest difference: {', '.join(parts)}" if parts else found

    def add(self, names: Sequence[str], expected: Outputs, found: Outputs) -> None:
        """Compare the outputs of these names on one image. Partners have one class, and are within the limits."""
        self.images += 1
        self.detections += len(expected[0])
        one, other = (dict(zip(names, outputs)) for outputs in (expected, found))
        pairs = [pair for pair in _pairs(one, other) if self._is_same(one, other, *pair)]
        self.lost += max(len(expected[0]), len(found[0])) - len(pairs)

    def _is_same(self, one: dict[str, np.ndarray], other: dict[str, np.ndarray], i: int, j: int) -> bool:
        if one["classes"][i] != other["classes"][j]:
            return False
        values = {
            name: _difference(name, one[name][i], other[name][j]) for name in LIMITS if name in one
        }
        if any(value > LIMITS[name] for name, value in values.items()):
            return False
        for name, value in values.items():
            self.largest[name] = max(value, self.largest.get(name, 0.0))
        return True


@torch.no_grad()
def compare(
    names: Sequence[str],
    model: Callable[[torch.Tensor], Sequence[torch.Tensor]],
    exported: Callable[[torch.Tensor], Outputs],
    inputs: Sequence[torch.Tensor],
) -> Differences:
    """Run both on these inputs.

    Args:
        names: of the outputs.
    """
    differences = Differences()
    for image in inputs:
        expected = [output.cpu().numpy() for output in model(image)]
        differences.add(names, expected, exported(image))
    return differences


def _pairs(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> list[tuple[int, int]]:
    """The best partners by box, score and class; equal scores may come in any order."""
    distance = np.abs(one["boxes"][:, None] - other["boxes"]).max(axis=2, initial=0)
    distance = np.minimum(distance, 1e6)
    distance += 1e3 * np.abs(one["scores"][:, None] - other["scores"])
    distance += 1e7 * (one["classes"][:, None] != other["classes"])
    return list(zip(*map(np.ndarray.tolist, linear_sum_assignment(distance))))


def _difference(name: str, one: np.ndarray, other: np.ndarray) -> float:
    if name == "masks":
        return float((one ^ other).sum() / max(one.sum(), 100)) if one.shape == other.shape else np.inf
    if name == "keypoints":
        one, other = one[:, :2], other[:, :2]
    return float(np.abs(one - other).max(initial=0))
