"""The parts of a detector, backbone, neck, head and the rest: their parameters and their share of the time."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .timing import clock

#: ``neck`` is what a backbone has around its ``bottom_up`` network, ``head`` all other modules with parameters,
#: and the rest normalizes images, decodes boxes and suppresses double ones.
PARTS = ("backbone", "neck", "head")
REST = "pre- and post-processing"

_MOST_ROUNDS = 20


def part_of(name: str, has_bottom_up: bool) -> str:
    """The part of a detector that a parameter or module belongs to, by its dotted name."""
    if not f"{name}.".startswith("backbone."):
        return "head"
    return "neck" if has_bottom_up and not f"{name}.".startswith("backbone.bottom_up.") else "backbone"


def has_bottom_up(model: nn.Module) -> bool:
    """Whether the detector has a neck around a bottom-up network."""
    return isinstance(getattr(getattr(model, "backbone", None), "bottom_up", None), nn.Module)


def parameters(model: nn.Module) -> dict[str, int]:
    """The number of parameters of each part."""
    counts, nested = dict.fromkeys(PARTS, 0), has_bottom_up(model)
    for name, parameter in model.named_parameters():
        counts[part_of(name, nested)] += parameter.numel()
    return counts


def time_shares(
    model: nn.Module, inputs: Sequence[dict[str, Any]], *, seconds: float = 2.0
) -> dict[str, float]:
    """The share of each part, and of the rest, in the time of a prediction; they add up to 1.

    Args:
        model: in eval.
        inputs: of the model, at least one.
        seconds: after so many no further round begins; there are 2 to 20 rounds.
    """
    with torch.inference_mode():
        started, rounds = time.perf_counter(), [_shares(model, inputs)]
        while len(rounds) < 2 or (
            len(rounds) < _MOST_ROUNDS and time.perf_counter() - started < seconds
        ):
            rounds.append(_shares(model, inputs))
    shares = {part: statistics.median(each[part] for each in rounds) for part in PARTS}
    return {**shares, REST: max(0.0, 1.0 - sum(shares.values()))}


def _shares(model: nn.Module, inputs: Sequence[dict[str, Any]]) -> dict[str, float]:
    with _timed(model) as seconds:
        start = clock()
        for item in inputs:
            model([item])
        whole = clock() - start
    return {part: each / whole for part, each in seconds.items()}


@contextlib.contextmanager
def _timed(model: nn.Module) -> Iterator[dict[str, float]]:
    """Inside, the seconds spent in each part add up: while a part's module runs, or a module inside it, as some
    detectors call only these. Time in the bottom-up network is none of its neck."""
    seconds = dict.fromkeys(PARTS, 0.0)
    running: list[str] = []  # the parts of the modules that run, the outermost first
    since = 0.0

    def switch() -> None:
        nonlocal since
        now = clock()
        if running:
            seconds[running[-1]] += now - since
        since = now

    def enter(part: str, *_: Any) -> None:
        switch()
        running.append(part)

    def leave(*_: Any) -> None:
        switch()
        running.pop()

    nested = has_bottom_up(model)
    hooks = []
    for name, module in _boundaries(model):
        hooks.append(module.register_forward_pre_hook(functools.partial(enter, part_of(name, nested))))
        hooks.append(module.register_forward_hook(leave))
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def _boundaries(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules at which a part begins: the backbone, its bottom-up network, and those of the head, with
    the modules directly inside these."""
    for name, child in model.named_children():
        if not any(True for _ in child.parameters()):
            continue
        yield name, child
        for inner, module in child.named_children():
            if name != "backbone" or inner == "bottom_up":
                yield f"{name}.{inner}", module
