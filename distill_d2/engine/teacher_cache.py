"""Let a training keep its teacher's outputs, as MODEL.DISTILLER.TEACHER_CACHE says."""

from __future__ import annotations

import logging
from typing import Any

import torch
from detectron2.utils import comm

from ..data import repeating_images
from ..distiller import Distiller
from ..teacher import Teacher
from ..teacher.cache import CachePlan, FolderStore, Layout, MemoryStore, fingerprint
from ..teacher.cache.layout import size_of

logger = logging.getLogger(__name__)

_KEY = "MODEL.DISTILLER.TEACHER_CACHE"


def use_teacher_cache(model: Distiller, loader: Any, batches: int) -> None:
    """Give the teacher the cache that its settings ask for.

    Args:
        loader: of the training.
        batches: that a process reads in the whole run.

    Raises:
        ValueError: the images differ from pass to pass, or an output cannot be kept; the message names the
            augmentation or module, and the key.
        OSError: the folder cannot be written to.
    """
    teacher = model.teacher
    settings = teacher.cache_settings
    if not settings.place:
        return
    try:
        repeating = repeating_images(loader)
    except ValueError as error:
        raise ValueError(f"{_KEY} is '{settings.place}', but {error}; or set {_KEY} to ''") from None
    layout = teacher.layout()
    plan = CachePlan(
        repeating.sizes or [teacher.view.probe_size] * repeating.count,
        len(repeating.flips),
        repeating.grouped,
        lambda size: model.padding.of_images([torch.empty(3, *size, device="meta")]),
        settings,
    )
    plan.bytes_per_pixel = _bytes_per_pixel(teacher, layout, plan.common)
    teacher.keep_outputs(
        _store(teacher),
        layout,
        flips=repeating.flips,
        paddings=plan.paddings if plan.all_paddings else None,
        half=settings.half,
        share=plan.share,
    )
    logger.info(plan.describe())
    passes = batches * repeating.batch_size * comm.get_world_size() / repeating.count
    for warning in (*plan.warnings(), *_warnings(settings.in_memory, passes)):
        logger.warning(warning)


def _store(teacher: Teacher) -> MemoryStore | FolderStore:
    settings = teacher.cache_settings
    if settings.in_memory:
        return MemoryStore(settings.limit)
    return FolderStore(
        settings.place,
        fingerprint(teacher.view, teacher.run_settings, settings.half),
        settings.limit,
        teacher.describe(),
    )


def _warnings(in_memory: bool, passes: float) -> list[str]:
    found = []
    if in_memory and passes < 2:
        found.append(
            f"The run reads each image {passes:.1f} times: {_KEY} 'memory' saves nothing; a folder can be shared "
            "by several runs"
        )
    if in_memory and comm.get_world_size() > 1:
        found.append(
            f"{_KEY} is 'memory': each process keeps what it has seen itself; a folder is shared by all"
        )
    return found


def _bytes_per_pixel(teacher: Teacher, layout: Layout, size: tuple[int, int]) -> float:
    """That are kept of an image padded to this (H, W)."""
    image = torch.zeros(3, *size, device=teacher.device)
    with teacher.lent(), teacher.view.recording():
        (entry,) = layout.entries(teacher.image_outputs([image], size), teacher.cache_settings.half)
    return size_of(entry) / (size[0] * size[1])
