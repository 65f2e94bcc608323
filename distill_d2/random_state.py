"""All of a process's random generators, as plain values that a checkpoint can hold."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """The state of python's, numpy's and torch's (CPU, and current GPU) generators."""
    version, python_values, python_gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    state = {
        "python": [version, list(python_values), python_gauss],
        "numpy": [
            numpy["bit_generator"],
            numpy["state"]["key"].tolist(),
            int(numpy["state"]["pos"]),
            int(numpy["has_gauss"]),
            float(numpy["gauss"]),
        ],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what ``random_state`` gave."""
    version, python_values, python_gauss = state["python"]
    random.setstate((version, tuple(python_values), python_gauss))
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


@contextlib.contextmanager
def unchanged_random_state() -> Iterator[None]:
    """What is drawn inside does not change what is drawn afterwards."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
