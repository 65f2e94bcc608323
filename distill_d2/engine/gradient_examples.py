"""The images on which gradients are measured, and the random numbers: the same ones each time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from detectron2.utils.env import seed_all_rng

from ..data import example_batches
from ..random_state import unchanged_random_state
from .settings import RunSettings

BATCH = 4  # images, at most
_BATCHES = 3


@contextlib.contextmanager
def gradient_examples(
    loader: Any, settings: RunSettings, count: int = _BATCHES
) -> Iterator[list[list[Any]] | None]:
    """The images of ``count`` batches of four, of the training data, the same ones, equally augmented, each time
    and in each process; what is drawn inside is the same each time, too, and changes nothing outside. Where a
    process trains on fewer than four at a time, the batches are smaller, and more.

    Args:
        loader: of the training. None is given for one that is not of distill_d2.
    """
    parts = 2 if settings.amp_key else 1  # float32 takes twice the memory
    with unchanged_random_state():
        seed_all_rng(0)
        yield example_batches(loader, count * BATCH, BATCH, parts)
