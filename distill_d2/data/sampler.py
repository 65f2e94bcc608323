"""A training sampler whose stream of images a resumed run can continue."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Callable

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from torch.utils.data import Sampler


class ResumableTrainingSampler(Sampler[int]):
    """One of detectron2's training samplers, which can skip what a stopped run has seen.

    With ``wide`` it also groups by aspect ratio: each ``batch_size`` consecutive indices are all
    wide images or all tall ones, in the order in which detectron2's AspectRatioGroupedDataset would
    emit its batches. That class keeps half-filled groups of loaded images, which no resumed run can
    rebuild without loading them again; indices can be grouped again in no time.

    Attributes:
        seed: of the stream, the same in all processes; may be set before iteration, by all processes together.
        skipped_batches: the number of this process's batches before the first.
    """

    def __init__(
        self,
        make: Callable[[int], Iterable[int]],
        *,
        batch_size: int,
        wide: Sequence[bool] | None = None,
        seed: int | None = None,
    ):
        """
        Args:
            make: the sampler of a seed: this process's endless stream of indices, always the same. Samplers
                that take no seed: see ``seeded``.
            batch_size: images per process and step.
            wide: per image whether width > height; None: no grouping.
            seed: None: a random one that all processes share. A resumed run has the same order only with
                the same seed, number of processes and batch size.

        Raises:
            ValueError: batch_size is below 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        self._make: Callable[[int], Iterable[int]] | None = make
        self.batch_size = batch_size
        self.wide = None if wide is None else [bool(flag) for flag in wide]
        self.skipped_batches = 0
        self._seed = comm.shared_random_seed() if seed is None else int(seed)
        self._indices = make(self._seed)

    @property
    def seed(self) -> int:
        return self._seed

    @seed.setter
    def seed(self, seed: int) -> None:
        if seed == self._seed:
            return
        assert self._make is not None  # only copies in other processes lack it
        self._seed = int(seed)
        self._indices = self._make(self._seed)

    def skip_batches(self, count: int) -> None:
        """Start after this process's first ``count`` batches (100,000 of 16 take a second or two)."""
        self.skipped_batches = count

    def __iter__(self) -> Iterator[int]:
        indices = iter(self._indices)
        if self.wide is not None:
            indices = self._grouped(indices, self.wide)
        return itertools.islice(indices, self.skipped_batches * self.batch_size, None)

    def __getstate__(self) -> dict[str, Any]:
        """For workers that are not forked; ``make`` may hold the whole dataset."""
        return {**self.__dict__, "_make": None}

    def _grouped(self, indices: Iterator[int], wide: Sequence[bool]) -> Iterator[int]:
        groups: list[list[int]] = [[], []]
        for index in indices:
            group = groups[wide[index]]
            group.append(index)
            if len(group) == self.batch_size:
                yield from group
                group.clear()


def seeded(build: Callable[[], Iterable[int]]) -> Callable[[int], Iterable[int]]:
    """A function of a seed, from one that builds a sampler which draws its seeds from numpy, as all of
    detectron2's do."""

    def make(seed: int) -> Iterable[int]:
        state = np.random.get_state()
        np.random.seed(seed)
        try:
            return build()
        finally:
            np.random.set_state(state)

    return make


def sampler_of_config(cfg: CfgNode, dataset: Sequence[dict[str, Any]]) -> Callable[[int], Iterable[int]]:
    """detectron2's DATALOADER.SAMPLER_TRAIN, as a function of the seed."""
    if cfg.DATALOADER.SAMPLER_TRAIN == "TrainingSampler":
        return lambda seed: TrainingSampler(len(dataset), seed=seed)
    return seeded(lambda: build_detection_train_loader.from_config(cfg, dataset=dataset)["sampler"])
