"""Random numbers of a loss: they repeat when a run is resumed, differ between processes, and change no others."""

from __future__ import annotations

import zlib

import numpy as np
import torch


def seed_of(iteration: int, name: str = "") -> int:
    """For this process's random numbers of an iteration.

    torch's seed is SEED plus the rank: processes differ, a resumed run repeats its numbers, and other
    random numbers do not change.

    Args:
        name: what is drawn, "mgd p3" for example; other names give other numbers.
    """
    entropy = [torch.initial_seed(), iteration % 2**32]
    if name:
        entropy.append(zlib.crc32(name.encode()))
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def generator_of(iteration: int, name: str, device: torch.device) -> torch.Generator:
    """A generator on ``device``, seeded by ``seed_of``; the host does not wait for the device.

    ``torch.rand(shape, device=device, generator=generator_of(batch.iteration, "mgd p3", device))``
    """
    return torch.Generator(device).manual_seed(seed_of(iteration, name))
