"""A training sampler whose stream of images a resumed run can continue."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from detectron2.data.samplers import TrainingSampler


class ResumableTrainingSampler(TrainingSampler):
    """detectron2's TrainingSampler that can skip what a stopped run has seen.

    With ``wide`` it also groups by aspect ratio: each ``batch_size`` consecutive indices are all
    wide images or all tall ones, in the order in which detectron2's AspectRatioGroupedDataset would
    emit its batches. That class keeps half-filled groups of loaded images, which no resumed run can
    rebuild without loading them again; indices can be grouped again in no time.

    Attributes:
        seed: of the shuffling, the same in all processes; may be set before iteration.
    """

    def __init__(
        self,
        size: int,
        *,
        batch_size: int,
        wide: Sequence[bool] | None = None,
        shuffle: bool = True,
        seed: int | None = None,
    ):
        """
        Args:
            size: number of images.
            batch_size: images per process and step.
            wide: per image whether width > height; None: no grouping.
            shuffle: of TrainingSampler.
            seed: of TrainingSampler. A resumed run has the same order only with the same seed, number of
                processes and batch size.

        Raises:
            ValueError: there are no images, batch_size is below 1, or ``wide`` has another length.
        """
        super().__init__(size, shuffle=shuffle, seed=seed)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        if wide is not None and len(wide) != size:
            raise ValueError(
                f"'wide' has {len(wide)} entries, expected one for each of the {size} images"
            )
        self.batch_size = batch_size
        self.wide = None if wide is None else [bool(flag) for flag in wide]
        self.skipped_batches = 0

    @property
    def seed(self) -> int:
        return self._seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self._seed = int(seed)

    def skip_batches(self, count: int) -> None:
        """Start after this process's first ``count`` batches (100,000 of 16 take a second or two)."""
        self.skipped_batches = count

    def __iter__(self) -> Iterator[int]:
        indices = super().__iter__()
        if self.wide is not None:
            indices = self._grouped(indices, self.wide)
        return itertools.islice(indices, self.skipped_batches * self.batch_size, None)

    def _grouped(self, indices: Iterator[int], wide: Sequence[bool]) -> Iterator[int]:
        groups: list[list[int]] = [[], []]
        for index in indices:
            group = groups[wide[index]]
            group.append(index)
            if len(group) == self.batch_size:
                yield from group
                group.clear()
