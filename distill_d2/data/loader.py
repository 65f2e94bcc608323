"""detectron2's training loader, with workers that survive a job's SIGTERM."""

from __future__ import annotations

import signal
from typing import Any, Callable, Dict, List

import torch
from detectron2.data import DatasetFromList, MapDataset
from detectron2.data.build import trivial_batch_collator, worker_init_reset_seed
from detectron2.data.common import ToIterableDataset
from detectron2.utils import comm
from torch.utils.data import DataLoader

from .sampler import ResumableTrainingSampler


def build_train_loader(
    dataset: List[Dict[str, Any]],
    mapper: Callable[[Dict[str, Any]], Any],
    sampler: ResumableTrainingSampler,
    num_workers: int,
) -> DataLoader:
    """As detectron2's ``build_detection_train_loader``; an endless loader of lists of dicts.

    Args:
        dataset: detectron2's dicts.
        mapper: makes of one dict what the model reads.
        sampler: order and batch size.
        num_workers: processes that load; 0: in the training process.
    """
    mapped = MapDataset(DatasetFromList(dataset, copy=False), mapper)
    return DataLoader(
        ToIterableDataset(mapped, sampler, shard_chunk_size=sampler.batch_size),
        batch_size=sampler.batch_size,
        drop_last=True,
        num_workers=num_workers,
        collate_fn=trivial_batch_collator,
        worker_init_fn=_start_worker,
        # Workers draw their seeds from here, not from the generator that training uses.
        generator=torch.Generator().manual_seed(sampler.seed + comm.get_rank()),
    )


def _start_worker(worker_id: int) -> None:
    worker_init_reset_seed(worker_id)
    # A scheduler's SIGTERM goes to all processes of a job; the training process still needs its
    # workers to end the step that runs, and ends them itself.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
