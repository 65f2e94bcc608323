"""Batches of an evaluation whose images have one padded size, so that detections are those of image by image."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any, Callable

import torch
from detectron2.data import DatasetFromList, DatasetMapper, MapDataset
from detectron2.data import transforms as T
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import InferenceSampler
from detectron2.modeling import Backbone
from detectron2.structures import ImageList
from torch import nn
from torch.utils.data import DataLoader, Sampler

from .loader import ShieldedLoader
from .read_errors import NamedReadErrors

logger = logging.getLogger(__name__)

Size = tuple[int, int]


def batched_test_loader(
    records: Sequence[dict[str, Any]],
    mapper: Callable[[dict[str, Any]], Any],
    model: nn.Module,
    batch_size: int,
    num_workers: int = 0,
) -> ShieldedLoader:
    """Like detectron2's ``build_detection_test_loader``, but with batches of several images that the model pads to
    one size. What each process gets is the same.

    Images whose padded size is not known before they are read (no "height" and "width" in the record, or a mapper
    or augmentation of another class than detectron2's resizing and flipping) are evaluated one by one; the log
    says how many.

    Args:
        records: detectron2's dicts.
        mapper: turns one of them into an input of the model.
        model: a detector.
        batch_size: images of this process at a time, at most.
        num_workers: number of loading processes.
    """
    padded = _padding_of(model)
    sizes = [_size(record, mapper) for record in records]
    batches = BatchesOfOneSize([size and padded(*size) for size in sizes], batch_size)
    unknown = sizes.count(None)
    if unknown:
        logger.info(
            f"{unknown} of {len(sizes)} images are evaluated one by one, not in batches of {batch_size}: their "
            "size is not known before they are read"
        )
    return ShieldedLoader(
        DataLoader(
            MapDataset(DatasetFromList(list(records), copy=False), NamedReadErrors(mapper)),
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=trivial_batch_collator,
        )
    )


class BatchesOfOneSize(Sampler[list[int]]):
    """Indices of this process's images, in batches of one size; large sizes first, so that too little memory shows
    at once."""

    def __init__(self, sizes: Sequence[Size | None], batch_size: int):
        """
        Args:
            sizes: (height, width) of each image of the dataset; None: it has a batch for itself.
            batch_size: at most; a size's last batch may have less.
        """
        groups: dict[Size, list[int]] = {}
        alone = []
        for index in InferenceSampler(len(sizes)):
            size = sizes[index]
            if size is None:
                alone.append([index])
            else:
                groups.setdefault(size, []).append(index)
        largest_first = sorted(groups, key=lambda size: (size[0] * size[1], size), reverse=True)
        self._batches = [
            groups[size][first : first + batch_size]
            for size in largest_first
            for first in range(0, len(groups[size]), batch_size)
        ] + alone

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)


def _padding_of(model: nn.Module) -> Callable[[int, int], Size]:
    """From an image's size to that to which detectron2 pads it for this model; without a backbone each size is its
    own."""
    backbone: Any = next((m for m in model.modules() if isinstance(m, Backbone)), None)

    @functools.cache
    def padded(height: int, width: int) -> Size:
        if backbone is None:
            return height, width
        image = torch.empty(1, height, width, device="meta")
        images = ImageList.from_tensors(
            [image], backbone.size_divisibility, padding_constraints=backbone.padding_constraints
        )
        return images.tensor.shape[-2], images.tensor.shape[-1]

    return padded


def _size(record: dict[str, Any], mapper: Callable[[dict[str, Any]], Any]) -> Size | None:
    """(height, width) of the model's input; None if it is not known before the image is read."""
    height, width = record.get("height"), record.get("width")
    if height is None or width is None or type(mapper) is not DatasetMapper:
        return None
    detectron2s: Any = mapper
    return resized(detectron2s.augmentations.augs, height, width)


def resized(augmentations: Sequence[Any], height: int, width: int) -> Size | None:
    """(height, width) of an image after augmentations; None if it is not known before they are run."""
    for augmentation in augmentations:
        if type(augmentation) is T.ResizeShortestEdge and len(set(augmentation.short_edge_length)) == 1:
            shortest = augmentation.short_edge_length[0]
            if shortest:
                size = T.ResizeShortestEdge.get_output_shape(
                    height, width, shortest, augmentation.max_size
                )
                height, width = size
        elif type(augmentation) is T.Resize:
            height, width = augmentation.shape
        elif type(augmentation) is not T.RandomFlip:
            return None
    return height, width
