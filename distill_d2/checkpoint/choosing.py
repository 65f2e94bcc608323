"""Which checkpoint of a run --resume continues from."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

import torch

from .integrity import Refused, check_weights, check_whole, is_zip
from .reading import errors_name_file, read_torch

LAST = "last_checkpoint"
_OF_A_RUN = re.compile(r"model_(\d{7,}|final)\.pth")
_LONGEST_NAME = 255


@dataclass(frozen=True)
class Choice:
    """The checkpoint to continue from, and why not others.

    Attributes:
        path: "" for none.
        iteration: of its last step; -1 if it holds none.
        problems: what is wrong with ``last_checkpoint`` and with other files, one text each; none in a folder
            without a run.
    """

    path: str
    iteration: int
    problems: list[str]


def run_checkpoints(folder: str) -> list[str]:
    """Paths of the checkpoints, torn or whole, that a run has written to a folder."""
    if not os.path.isdir(folder):
        return []
    names = (name for name in sorted(os.listdir(folder)) if _OF_A_RUN.fullmatch(name))
    return [path for path in (os.path.join(folder, name) for name in names) if os.path.isfile(path)]


def choose(folder: str, with_trainer: bool) -> Choice:
    """The newest whole checkpoint in a folder, by the iteration inside.

    ``last_checkpoint`` decides only where it names a whole file and was written after all others, which
    is how a user goes back to an older one.

    Args:
        with_trainer: weights without a trainer's state do not count.
    """
    named, problem = _named(folder)
    problems, iterations = [problem] if problem else [], {}
    for path in dict.fromkeys([*run_checkpoints(folder), *([named] if named else [])]):
        try:
            iterations[path] = _iteration(path, with_trainer)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    for path in _order(iterations, folder, named):
        try:
            with errors_name_file(path):
                check_whole(path)
        except (ValueError, OSError) as error:
            problems.append(str(error))
        else:
            return Choice(path, iterations[path], problems)
    return Choice("", -1, problems)


def _order(iterations: dict[str, int], folder: str, named: str) -> list[str]:
    """The paths, the one to prefer first."""
    times = {path: os.path.getmtime(path) for path in iterations}
    order = sorted(iterations, key=lambda path: (iterations[path], times[path]), reverse=True)
    if named in times and os.path.getmtime(os.path.join(folder, LAST)) >= max(times.values()):
        order.remove(named)
        order.insert(0, named)
    return order


def _named(folder: str) -> tuple[str, str]:
    """The path that ``last_checkpoint`` names, "" for none; what is wrong with that file, "" for nothing."""
    tag = os.path.join(folder, LAST)
    if not os.path.isfile(tag):
        return "", f"{tag} is missing" if run_checkpoints(folder) else ""
    with open(tag, "rb") as file:
        content = file.read(_LONGEST_NAME + 1).strip()
    if not content:
        return "", f"{tag} is empty"
    name = content.decode(errors="replace")
    if not name.isprintable() or len(content) > _LONGEST_NAME or os.path.basename(name) != name:
        return "", f"{tag} does not hold the name of a file"
    path = os.path.join(folder, name)
    return (path, "") if os.path.isfile(path) else ("", f"{tag} names '{name}', which does not exist")


def _iteration(path: str, with_trainer: bool) -> int:
    """Of the last step. Raises ValueError, OSError if the file is torn or nothing to continue from; tensors
    are not read."""
    with errors_name_file(path):
        entries = _entries(path)
        check_weights(entries.get("model"))
        state = entries.get("trainer", entries)
        iteration = state.get("iteration") if isinstance(state, dict) else None
        if isinstance(iteration, int) and iteration >= 0:
            return iteration
        if with_trainer:
            raise Refused("it holds weights without the state of a training (iteration, optimizer)")
        return -1


def _entries(path: str) -> dict[str, Any]:
    if not is_zip(path):
        return read_torch(path)
    entries = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return entries if isinstance(entries, dict) else {}
