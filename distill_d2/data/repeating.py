"""Training images that are the same in each pass over the data, but for flips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.data import DatasetMapper
from detectron2.data import transforms as T

from .augmentation import BoxAwareMapper
from .batches import resized
from .loader import mapper_and_records
from .read_errors import NamedReadErrors

_VERTICAL, _HORIZONTAL = 1, 2  # dimensions of an image (C, H, W)


@dataclass(frozen=True)
class RepeatingImages:
    """What is known of them.

    Attributes:
        count: of the images in a pass.
        flips: the dimensions of an image (C, H, W) along which it may be mirrored.
        sizes: (height, width) in pixels of each image as it is trained on, before padding; empty: not known.
        grouped: whether the images of a batch are all wide, or all not.
        batch_size: of a process.
    """

    count: int
    flips: Sequence[tuple[int, ...]]
    sizes: Sequence[tuple[int, int]]
    grouped: bool
    batch_size: int


def repeating_images(loader: Any) -> RepeatingImages:
    """The images of a training loader, by the augmentations that its mapper was really built with.

    Raises:
        ValueError: they differ from pass to pass, or nothing is known of them; the message says why, and names the
            key.
    """
    found = mapper_and_records(loader)
    if found is None:
        raise ValueError(
            "the data loader is not detectron2's build_detection_train_loader with a list of images, so its "
            "augmentations are not known"
        )
    mapper: Any = found[0].mapper if isinstance(found[0], NamedReadErrors) else found[0]
    records = found[1]
    if type(mapper) not in (DatasetMapper, BoxAwareMapper):
        name = getattr(mapper, "__name__", type(mapper).__name__)
        raise ValueError(
            f"the mapper {name} (INPUT.MAPPER, dataloader.train.mapper) is not detectron2's DatasetMapper, so its "
            "augmentations are not known"
        )
    augmentations: Sequence[Any] = mapper.augmentations.augs
    for augmentation in augmentations:
        _refuse_changing(augmentation)
    sampler = loader.dataset.sampler
    return RepeatingImages(
        len(records),
        _flips(augmentations),
        _sizes(augmentations, records),
        sampler.wide is not None,
        sampler.batch_size,
    )


def _refuse_changing(augmentation: Any) -> None:
    kind, name = type(augmentation), type(augmentation).__name__
    if kind is T.ResizeShortestEdge:
        sides = sorted(set(augmentation.short_edge_length))
        if len(sides) == 1:
            return
        how = "between" if augmentation.is_range else "of"
        raise ValueError(
            f"ResizeShortestEdge draws a size {how} {sides} for each image, so it is another one in each pass "
            "over the data; set INPUT.MIN_SIZE_TRAIN to one number, or INPUT.FIXED_SIZE"
        )
    if kind in (T.Resize, T.RandomFlip):
        return
    key = "INPUT.CROP.ENABLED" if kind is T.RandomCrop else "INPUT.AUGMENTATIONS"
    raise ValueError(
        f"{name} may make another image of each one in each pass over the data; leave it out ({key}, "
        "dataloader.train.mapper.augmentations)"
    )


def _flips(augmentations: Sequence[Any]) -> list[tuple[int, ...]]:
    """Those that come after the last change of size: an image mirrored afterwards has the same pixels."""
    dims: set[int] = set()
    for augmentation in augmentations:
        if type(augmentation) is not T.RandomFlip:
            dims.clear()
        elif augmentation.prob > 0:
            dims.add(_HORIZONTAL if augmentation.horizontal else _VERTICAL)
    both = [(_VERTICAL, _HORIZONTAL)] if len(dims) == 2 else []
    return [*((dim,) for dim in sorted(dims)), *both]


def _sizes(augmentations: Sequence[Any], records: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    if not all("height" in record and "width" in record for record in records):
        return []
    sizes = [resized(augmentations, record["height"], record["width"]) for record in records]
    return [size for size in sizes if size is not None]
