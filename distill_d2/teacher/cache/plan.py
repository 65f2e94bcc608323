"""What will be kept of a training's images, and how much it takes, before the training starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

from .settings import GIGABYTE, CacheSettings

Size = tuple[int, int]

_MOST = 4  # paddings of an image on average, for which the teacher is run at once
_MANY = 256  # joint paddings, which are not counted further
_SPARE = 0.98  # of the limit; sizes are estimates


class CachePlan:
    """How often each image is kept: mirrored or not, and for each size to which its batch may be padded.

    Attributes:
        common: the size (H, W) to which most images are padded alone.
    """

    def __init__(
        self,
        sizes: Sequence[Size],
        flips: int,
        grouped: bool,
        pad: Callable[[Size], Size],
        settings: CacheSettings,
    ):
        """
        Args:
            sizes: (height, width) in pixels of each image as it is trained on.
            flips: the number of mirror images of an image.
            grouped: whether the images of a batch are all wide, or all not.
            pad: gives the size to which an image is padded alone; a batch is padded to the largest sides.
            settings: the limit.
        """
        self._own = {size: pad(size) for size in set(sizes)}
        self._counts = Counter(sizes)
        self._grouped = grouped
        self._versions = 1 + flips
        self._settings = settings
        self._joint = {wide: _joined(self._padded(wide)) for wide in (False, True)}
        self.common = Counter(self._own[size] for size in sizes).most_common(1)[0][0]
        self.bytes_per_pixel = 0.0

    def paddings(self, size: Size) -> list[Size]:
        """The sizes to which a batch with an image of this (height, width) may be padded."""
        own = self._own.get(size, size)
        return [
            (height, width)
            for height, width in self._joint[self._is_wide(size)]
            if height >= own[0] and width >= own[1]
        ]

    @cached_property
    def paddings_of_image(self) -> float:
        """Of an image, on average."""
        total = sum(count * len(self.paddings(size)) for size, count in self._counts.items())
        return total / self._counts.total()

    @property
    def all_paddings(self) -> bool:
        """Whether the teacher is run at once for each size to which an image may be padded: they are few."""
        return self.paddings_of_image <= _MOST and self.needed <= self._settings.limit

    @cached_property
    def needed(self) -> int:
        """Bytes for all images; where there are many paddings, for one of each image."""
        few = self.paddings_of_image <= _MOST
        pixels = sum(
            count * height * width
            for size, count in self._counts.items()
            for height, width in (self.paddings(size) if few else [self._own[size]])
        )
        return int(pixels * self.bytes_per_pixel * self._versions)

    @property
    def share(self) -> float:
        """Of the images that are kept."""
        return min(1.0, _SPARE * self._settings.limit / max(self.needed, 1))

    def describe(self) -> str:
        """For the log."""
        height, width = self.common
        image = self.bytes_per_pixel * height * width
        place = "in memory" if self._settings.in_memory else f"in {self._settings.place}"
        mirrored = f" x {self._versions} (mirrored)" if self._versions > 1 else ""
        count = self.paddings_of_image
        padded = f" x {count:.1f} paddings" if 1 < count <= _MOST else ""
        return (
            f"Teacher cache: {image / 2**20:.3g} MB for an image padded to {height}x{width}, "
            f"{self._counts.total()} images{mirrored}{padded}: "
            f"{self.needed / GIGABYTE:.3g} GB {place}, TEACHER_CACHE_GB is "
            f"{self._settings.gigabytes:g}"
        )

    def warnings(self) -> list[str]:
        """What makes the cache of less use than it could be."""
        found = []
        if self.share < 1:
            found.append(
                f"TEACHER_CACHE_GB {self._settings.gigabytes:g} has room for {self.share:.0%} of the images; for "
                f"the others the teacher is run in each step. All take {self.needed / GIGABYTE:.3g} GB"
            )
        if self.paddings_of_image > _MOST:
            found.append(
                f"A batch with an image may be padded to {self.paddings_of_image:.0f} sizes on average, and the "
                "teacher is run for each of them: INPUT.FIXED_SIZE makes it one"
            )
        return found

    def _is_wide(self, size: Size) -> bool:
        return self._grouped and size[1] > size[0]

    def _padded(self, wide: bool) -> set[Size]:
        return {own for size, own in self._own.items() if self._is_wide(size) is wide}


def _joined(sizes: Iterable[Size]) -> list[Size]:
    """All sizes to which batches of images of these padded sizes are padded."""
    found = set(sizes)
    while len(found) < _MANY:
        more = {(max(a, c), max(b, d)) for a, b in found for c, d in found} - found
        if not more:
            break
        found |= more
    return sorted(found)
