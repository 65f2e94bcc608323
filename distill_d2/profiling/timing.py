"""Milliseconds per image of several detectors, measured in turn."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Callable

import torch
from torch import nn

_LEAST_ROUNDS = 5
_MOST_ROUNDS = 50


def milliseconds_per_image(
    models: Mapping[str, nn.Module],
    inputs: Mapping[str, Sequence[dict[str, Any]]],
    *,
    seconds: float = 10.0,
) -> dict[str, list[float]]:
    """Time whole predictions, a batch of one image each; the models are in eval.

    Args:
        models: by name.
        inputs: of each model, at least one, as a dataset mapper returns them: {"image": (C, H, W), ...}.
        seconds: about how long to measure; see ``time_in_turn``.

    Returns:
        milliseconds per image, one number for each round; ``statistics.median`` of them is the result, and
        ``time_ratio`` compares two models.
    """

    def prediction(name: str) -> Callable[[], None]:
        def run() -> None:
            for item in inputs[name]:
                models[name]([item])

        return run

    with torch.inference_mode():
        times = time_in_turn({name: prediction(name) for name in models}, seconds=seconds)
    return {name: [1000 * each / len(inputs[name]) for each in times[name]] for name in models}


def time_in_turn(
    tasks: Mapping[str, Callable[[], Any]], *, seconds: float = 10.0
) -> dict[str, list[float]]:
    """Seconds that each task takes, one number for each round.

    Every round runs all tasks, so that other work on the machine slows all of them, and every other round runs
    them backwards. A first round, to warm up, does not count; 5 to 50 rounds do.

    Args:
        tasks: by name.
        seconds: after so many no further round begins.
    """
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for run in tasks.values():
        run()
    started = time.perf_counter()
    for index in range(_MOST_ROUNDS):
        if index >= _LEAST_ROUNDS and time.perf_counter() - started > seconds:
            break
        for name in tasks if index % 2 == 0 else reversed(list(tasks)):
            times[name].append(_seconds(tasks[name]))
    return times


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Inside, torch computes with so many threads; 0: as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """How much longer the first takes than the second, both of the same call: the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(times, others))


def clock() -> float:
    """Seconds: with one thread on a CPU those that this process works, which other processes disturb least; else
    those on the wall, when all that was given to the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _seconds(run: Callable[[], Any]) -> float:
    start = clock()
    run()
    return clock() - start
