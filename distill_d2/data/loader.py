"""detectron2's data loaders, with workers that survive a job's SIGTERM and end with it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import weakref
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Callable

import numpy as np
import torch
from detectron2.data import DatasetFromList
from detectron2.data.build import trivial_batch_collator
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .sampler import ResumableTrainingSampler

_TRIES = 100  # images until a mapper that returns None for each is taken to be wrong
_iterators: weakref.WeakSet = weakref.WeakSet()


class ShieldedLoader:
    """A DataLoader whose workers ignore SIGINT and SIGTERM.

    Ctrl-C in a terminal and SIGTERM from a scheduler go to all processes of a job, but the training
    process still needs its workers to finish the current step. ``end_workers()`` ends them.

    Attributes:
        images: describes the images, for a comparison with those of another run; "": not known.
    """

    def __init__(self, loader: DataLoader, images: str = ""):
        self.loader = loader
        self.images = images
        self.dataset = loader.dataset

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        with _signals_blocked():  # processes inherit what is blocked when they are started
            iterator = iter(self.loader)
        _iterators.add(iterator)
        return iterator


def end_workers() -> None:
    """End the workers of all loaders that are still being read.

    The workers ignore the signal with which Python ends its children. Without this call Python would wait
    for them forever, in particular after an error, because the traceback keeps the loader alive.
    """
    for iterator in list(_iterators):
        # Only iterators with workers have this method; there is no public one.
        getattr(iterator, "_shutdown_workers", lambda: None)()
        _iterators.discard(iterator)


def build_train_loader(
    dataset: Sequence[dict[str, Any]],
    mapper: Callable[[dict[str, Any]], Any],
    sampler: ResumableTrainingSampler,
    num_workers: int,
) -> ShieldedLoader:
    """Like detectron2's ``build_detection_train_loader``: an endless loader of lists of dicts.

    Where the training process loads, augmentations draw from its random generators, which a checkpoint has.
    In workers each image has a seed of its own, made from the sampler's seed, the process's rank and the
    image's place in the stream: then neither the number of workers nor what they have loaded ahead matters.

    Args:
        dataset: detectron2's dicts.
        mapper: turns one of them into an input of the model; None: another image is tried in its place.
        sampler: order and batch size.
        num_workers: number of loading processes; 0: the training process loads.
    """
    return ShieldedLoader(
        DataLoader(
            _MappedStream(DatasetFromList(dataset, copy=False), mapper, sampler),
            batch_size=sampler.batch_size,
            drop_last=True,
            num_workers=num_workers,
            collate_fn=trivial_batch_collator,
            pin_memory=torch.cuda.is_available(),  # images go to a GPU while the step before still runs
            # Not drawn from the generator that training uses.
            generator=torch.Generator().manual_seed(sampler.seed + comm.get_rank()),
        ),
        _describe(dataset),
    )


def example_batches(loader: Any, count: int, most: int, parts: int = 1) -> list[list[Any]] | None:
    """Images from all over the training data, mapped; the same ones at each call and in each process. The order
    in which images are trained on stays as it is.

    Args:
        loader: of ``build_train_loader``.
        count: the number of images, at most.
        most: the number of images in a batch, at most.
        parts: of one of the loader's batches, one of which is the number of images in a batch, at most.

    Returns:
        None for other loaders.
    """
    stream = getattr(loader, "dataset", None)
    if not isinstance(stream, _MappedStream):
        return None
    images = stream.examples(min(count, len(stream.dataset)))
    size = max(1, min(most, stream.sampler.batch_size // parts))
    return [images[first : first + size] for first in range(0, len(images), size)]


def mapper_and_records(
    loader: Any,
) -> tuple[Callable[[dict[str, Any]], Any], Sequence[dict[str, Any]]] | None:
    """The mapper and the dataset dicts of a loader of ``build_train_loader``; None for other loaders."""
    stream = getattr(loader, "dataset", None)
    return (stream.mapper._obj, stream.dataset) if isinstance(stream, _MappedStream) else None


def _describe(dataset: Sequence[dict[str, Any]]) -> str:
    """The number of images, and a checksum of their files' names and numbers of annotations."""
    names = (
        f"{os.path.basename(str(image.get('file_name')))} {len(image.get('annotations') or ())}"
        for image in dataset
    )
    return f"{len(dataset)} with checksum {zlib.crc32(chr(10).join(names).encode()):08x}"


class _MappedStream(IterableDataset):
    """The mapped images in the sampler's order; workers load whole batches in turn."""

    def __init__(self, dataset: DatasetFromList, mapper: Callable, sampler: ResumableTrainingSampler):
        self.dataset = dataset
        self.mapper = PicklableWrapper(mapper)  # for workers that are not forked
        self.sampler = sampler
        self.rank = comm.get_rank()  # workers do not know it

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first = self.sampler.skipped_batches * self.sampler.batch_size
        for place, index in enumerate(self.sampler, first):
            if worker is not None:
                if (place - first) // self.sampler.batch_size % worker.num_workers != worker.id:
                    continue
                seed_all_rng(self._seed(place))
            yield self._mapped(index)

    def examples(self, count: int) -> list[Any]:
        """Images evenly spaced over the dataset."""
        return [self._mapped(len(self.dataset) * place // count) for place in range(count)]

    def _seed(self, place: int) -> int:
        entropy = [self.sampler.seed, self.rank, place]
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def _mapped(self, index: int) -> Any:
        for _ in range(_TRIES):
            mapped = self.mapper(self.dataset[index])
            if mapped is not None:
                return mapped
            index = random.randrange(len(self.dataset))
        raise ValueError(
            f"the dataset mapper returned None for {_TRIES} images in a row; expected an input of the model for "
            "most of them (INPUT.MAPPER)"
        )


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
