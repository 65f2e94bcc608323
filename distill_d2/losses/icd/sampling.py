"""Query slots of a batch: its real instances and fakes that are drawn like the training data.

ICD describes an instance by its class and a point in its box, jittered so that the center is not
given away. The whole batch is computed at once, on the host, where the ground truth is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ...upload import upload

SAMPLE_RULES = ("relative", "fixed")
SCALE_BINS = 5
_SIZE_RANGE = (2e-3, 0.7)
_CENTER_RANGE = (0.03, 0.97)


@dataclass(frozen=True)
class BoxPrior:
    """The distribution of fakes.

    Attributes:
        probability: (classes,) of each class; sums to 1.
        mean, std: (classes, 2) of width and height, in units of the image's.
    """

    probability: np.ndarray
    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def uniform(cls, classes: int) -> BoxPrior:
        """All classes equally frequent; sizes 0.2 with deviation 0.2."""
        sizes = np.full((classes, 2), 0.2)
        return cls(np.full(classes, 1.0 / classes), sizes, sizes.copy())

    @classmethod
    def of(cls, statistics, classes: int) -> BoxPrior:
        """Frequencies and sizes of the training data.

        Args:
            statistics: a BoxStatistics.
            classes: number of classes, at least that of the statistics.

        Raises:
            ValueError: the statistics have instances of more classes.
        """
        needed = int(np.flatnonzero(statistics.counts).max(initial=-1)) + 1
        if needed > classes:
            raise ValueError(
                f"MODEL.DISTILLER.INS.NUM_CLASSES is {classes}, but the training data have instances "
                f"of class {needed - 1} (classes count from 0); set it to the number of classes"
            )
        prior = cls.uniform(classes)
        known = min(classes, len(statistics.counts))
        prior.mean[:known], prior.std[:known] = statistics.mean[:known], statistics.std[:known]
        prior.probability[:] = 0.0
        prior.probability[:known] = statistics.counts[:known] / statistics.counts.sum()
        return prior


@dataclass(frozen=True)
class Draws:
    """Random numbers for T slots.

    Attributes:
        classes: (T,) int64.
        sizes: (T, 2) width and height from the normal distribution of the class.
        centers, jitter: (T, 2) from U[0, 1).
    """

    classes: np.ndarray
    sizes: np.ndarray
    centers: np.ndarray
    jitter: np.ndarray


@dataclass(frozen=True)
class GroundTruth:
    """Boxes of one image: (n, 4) absolute XYXY in pixels, (n,) classes, its (height, width)."""

    boxes: np.ndarray
    classes: np.ndarray
    size: tuple[int, int]


@dataclass(frozen=True)
class Slots:
    """The slots of N images, padded to the K of the longest; float32 arrays unless stated.

    Attributes:
        classes: (N, K) int64, 0 in padded slots.
        boxes: (N, K, 4) XYXY in units of image width and height.
        points: (N, K, 2) the jittered xy.
        ltrb: (N, K, 4) distances from the point to the sides of its box.
        scales: (N, K, 2) bin of width and of height, 0 to 4.
        is_real, is_padding: (N, K) bool. Real ones come first in each image.
        real, filled: N numbers of real, and of all unpadded, slots.
    """

    classes: np.ndarray
    boxes: np.ndarray
    points: np.ndarray
    ltrb: np.ndarray
    scales: np.ndarray
    is_real: np.ndarray
    is_padding: np.ndarray
    real: list[int]
    filled: list[int]

    def to(self, device: torch.device) -> Queries:
        """The parts that the networks need, in one transfer."""
        columns = [self.classes, self.is_real, self.is_padding]
        packed = np.concatenate(
            [self.points, self.ltrb, self.scales, np.stack(columns, axis=-1)], axis=-1
        )
        values = upload(torch.from_numpy(packed.astype(np.float32)), device)
        points, ltrb, scales, columns = values.split((2, 4, 2, 3), dim=-1)
        classes, is_real, is_padding = columns.unbind(dim=-1)
        return Queries(points, ltrb, scales, classes, is_real, is_padding, self.real, self.filled)


@dataclass(frozen=True)
class Queries:
    """Slots on a device; all float32, see Slots.

    Attributes:
        points (N, K, 2), ltrb (N, K, 4), scales (N, K, 2), classes, is_real, is_padding (N, K).
        real, filled: numbers of real, and of unpadded, slots of each image, on the host.
    """

    points: torch.Tensor
    ltrb: torch.Tensor
    scales: torch.Tensor
    classes: torch.Tensor
    is_real: torch.Tensor
    is_padding: torch.Tensor
    real: list[int]
    filled: list[int]


class SlotSampler:
    """Fills the slots of a batch.

    An image with n instances gets n * (1 + ratio) slots by the rule "relative", at least 1 and at most
    max_labels, or num_labels slots by the rule "fixed"; never fewer than n.
    """

    def __init__(
        self,
        prior: BoxPrior,
        *,
        rule: str = "relative",
        ratio: float = 5.0,
        num_labels: int = 100,
        max_labels: int = 300,
        jitter: float = 0.3,
        last_image_scale: bool = False,
    ):
        """
        Args:
            prior: the distribution of fakes.
            rule, ratio, num_labels, max_labels: see above.
            jitter: of the point around the center, as a fraction of the box's size.
            last_image_scale: bin all boxes by the size of the last image, as in the reference.
        """
        self.prior = prior
        self.rule = rule
        self.ratio = ratio
        self.num_labels = num_labels
        self.max_labels = max_labels
        self.jitter = jitter
        self.last_image_scale = last_image_scale

    def num_slots(self, instances: int) -> int:
        """Slots of an image with this many instances."""
        if self.rule == "fixed":
            return max(self.num_labels, instances)
        slots = max(1, int(instances * (self.ratio + 1)))
        return min(slots, max(self.max_labels, instances))

    def draw(self, count: int, random: np.random.Generator) -> Draws:
        """Random numbers for ``count`` slots."""
        bounds = np.cumsum(self.prior.probability)
        classes = np.searchsorted(bounds, random.random(count) * bounds[-1], side="right")
        sizes = self.prior.mean[classes] + self.prior.std[classes] * random.standard_normal((count, 2))
        return Draws(classes, sizes, random.random((count, 2)), random.random((count, 2)))

    def sample(self, images: Sequence[GroundTruth], random: np.random.Generator) -> Slots:
        """Slots of N images."""
        count = sum(self.num_slots(len(image.boxes)) for image in images)
        return self.place(images, self.draw(count, random))

    def place(self, images: Sequence[GroundTruth], draws: Draws) -> Slots:
        """Slots of N images from given random numbers, which are in the order of the images."""
        real = np.array([len(image.boxes) for image in images])
        filled = np.array([self.num_slots(count) for count in real])
        image_of = np.repeat(np.arange(len(images)), filled)
        slot_of = np.arange(filled.sum()) - np.repeat(filled.cumsum() - filled, filled)
        is_real = slot_of < real[image_of]
        sizes = np.array([[image.size[1], image.size[0]] for image in images], dtype=np.float64)

        classes, boxes = draws.classes.copy(), self._fakes(draws)
        classes[is_real] = np.concatenate([image.classes for image in images])
        absolute = np.concatenate([image.boxes.reshape(-1, 4) for image in images])
        boxes[is_real] = absolute / np.tile(sizes[image_of[is_real]], 2)
        low, high = boxes[:, :2], boxes[:, 2:]
        points = (low + high) / 2 + (2 * draws.jitter - 1) * self.jitter * (high - low)
        pixels = sizes[-1] if self.last_image_scale else sizes[image_of]

        def padded(values: np.ndarray) -> np.ndarray:
            full = np.zeros((len(images), filled.max(initial=0), *values.shape[1:]), values.dtype)
            full[image_of, slot_of] = values
            return full

        return Slots(
            classes=padded(classes),
            boxes=padded(boxes).astype(np.float32),
            points=padded(points).astype(np.float32),
            ltrb=padded(np.hstack([points - low, high - points])).astype(np.float32),
            scales=padded(_scale_bins((high - low) * pixels)).astype(np.float32),
            is_real=padded(is_real),
            is_padding=~padded(np.ones(len(slot_of), dtype=bool)),
            real=real.tolist(),
            filled=filled.tolist(),
        )

    def _fakes(self, draws: Draws) -> np.ndarray:
        """(T, 4) normalized boxes in the image."""
        mean, std = self.prior.mean[draws.classes], self.prior.std[draws.classes]
        sizes = np.clip(draws.sizes, mean - 2 * std, mean + 2 * std).clip(*_SIZE_RANGE)
        centers = draws.centers.clip(*_CENTER_RANGE)
        return np.hstack([centers - sizes / 2, centers + sizes / 2]).clip(0.0, 1.0)


def _scale_bins(pixels: np.ndarray) -> np.ndarray:
    """Bins of sides in pixels: below about 64, 128, 256, 512, and above (1.44 for 1 / ln 2)."""
    bins = 1.44 * np.log(np.maximum(pixels, 1e-6)) - 5
    return np.floor(bins.clip(0, SCALE_BINS - 1))
