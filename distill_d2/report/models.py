"""The detectors of a report, loaded, and what they cost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..inference import Trained, load_trained
from ..mistakes import message_of
from ..profiling import milliseconds_per_image
from ..run_files import BEST
from .roles import Entry

_SECONDS = 5.0  # of measuring
_IMAGES = 4
_EMPTY = np.full((480, 640, 3), 128, np.uint8)


@dataclass(frozen=True)
class Cost:
    """``parameters``: their number; ``megabytes``: of the weights alone; ``milliseconds``: per image."""

    parameters: int
    megabytes: float
    milliseconds: float


def load_models(entries: Sequence[Entry], device: str) -> tuple[dict[str, Trained], list[str]]:
    """The detectors by names of entries, and notes: which weights were taken, or why one cannot be loaded."""
    models, notes, best = {}, [], []
    for entry in entries:
        folder = entry.run.folder
        try:
            models[entry.name] = load_trained(entry.config or str(folder), entry.weights, device)
        except (OSError, ValueError, KeyError, ImportError) as error:
            notes.append(f"{entry.name}: {message_of(error)}")
            continue
        if (folder / BEST).is_file():
            best.append(entry.name)
    if best:
        notes.append(f"Size, speed and pictures of {', '.join(best)} are of {BEST}.")
    return models, notes


def costs_of(models: Mapping[str, Trained], images: Sequence[np.ndarray] = ()) -> dict[str, Cost]:
    """What detectors cost, their time measured in turn; {} without a detector.

    Args:
        images: (H, W, 3) uint8, BGR, to find objects in; none: an empty one.
    """
    if not models:
        return {}
    images = list(images[:_IMAGES]) or [_EMPTY]
    inputs = {name: [trained.inputs(image) for image in images] for name, trained in models.items()}
    modules = {name: trained.model for name, trained in models.items()}
    times = milliseconds_per_image(modules, inputs, seconds=_SECONDS)
    return {
        name: Cost(
            parameters=sum(p.numel() for p in model.parameters()),
            megabytes=sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 1e6,
            milliseconds=statistics.median(times[name]),
        )
        for name, model in modules.items()
    }
