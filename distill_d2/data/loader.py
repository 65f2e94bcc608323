"""detectron2's data loaders, with workers that survive a job's SIGTERM and end with it."""

from __future__ import annotations

import contextlib
import signal
import weakref
from collections.abc import Iterator
from typing import Any, Callable

import torch
from detectron2.data import DatasetFromList, MapDataset
from detectron2.data.build import trivial_batch_collator, worker_init_reset_seed
from detectron2.data.common import ToIterableDataset
from detectron2.utils import comm
from torch.utils.data import DataLoader

from .sampler import ResumableTrainingSampler

_iterators: weakref.WeakSet = weakref.WeakSet()


class ShieldedLoader:
    """A DataLoader whose workers ignore SIGINT and SIGTERM.

    Ctrl-C in a terminal and SIGTERM from a scheduler go to all processes of a job, but the training
    process still needs its workers to finish the current step. ``end_workers()`` ends them.
    """

    def __init__(self, loader: DataLoader):
        self.loader = loader
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
    dataset: list[dict[str, Any]],
    mapper: Callable[[dict[str, Any]], Any],
    sampler: ResumableTrainingSampler,
    num_workers: int,
) -> ShieldedLoader:
    """Like detectron2's ``build_detection_train_loader``: an endless loader of lists of dicts.

    Args:
        dataset: detectron2's dicts.
        mapper: turns one of them into an input of the model.
        sampler: order and batch size.
        num_workers: number of loading processes; 0: the training process loads.
    """
    mapped = MapDataset(DatasetFromList(dataset, copy=False), mapper)
    return ShieldedLoader(
        DataLoader(
            ToIterableDataset(mapped, sampler, shard_chunk_size=sampler.batch_size),
            batch_size=sampler.batch_size,
            drop_last=True,
            num_workers=num_workers,
            collate_fn=trivial_batch_collator,
            pin_memory=torch.cuda.is_available(),  # images go to a GPU while the step before still runs
            worker_init_fn=worker_init_reset_seed,
            # Workers draw their seeds from here, not from the generator that training uses.
            generator=torch.Generator().manual_seed(sampler.seed + comm.get_rank()),
        )
    )


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
