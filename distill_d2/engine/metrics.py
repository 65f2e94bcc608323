"""metrics.json, and the scalars behind it, across interruptions."""

from __future__ import annotations

import json
import logging
import os
from types import SimpleNamespace
from typing import Any

from detectron2.utils.events import EventStorage, JSONWriter, TensorboardXWriter

from ..checkpoint import append_whole, write_whole
from ..run_files import METRICS

logger = logging.getLogger(__name__)

WINDOW = 20  # iterations whose median is logged, as in detectron2


class MetricsFile(JSONWriter):
    """detectron2's JSONWriter, which continues what is there, writes whole lines only, and makes its folder
    again where someone deleted it."""

    def __init__(self, folder: str):
        self._path = os.path.join(folder, METRICS)
        self._window_size = WINDOW
        self._last_write = last_iteration(folder)

    def write(self) -> None:
        """Raises OSError if the file cannot be written; the message names it."""
        lines: list[str] = []
        self._file_handle: Any = SimpleNamespace(write=lines.append, flush=lambda: None)
        super().write()
        if lines:
            append_whole(self._path, "".join(lines).encode())

    def close(self) -> None:
        pass


class Events(TensorboardXWriter):
    """detectron2's, which does not write again what an interrupted run wrote."""

    def __init__(self, folder: str):
        super().__init__(folder, WINDOW)
        self._last_write = last_iteration(folder)


def last_iteration(folder: str) -> int:
    """The last iteration in a folder's metrics.json; -1 for an empty or missing file."""
    return max((entry["iteration"] for entry in map(_entry, _lines(folder)) if entry), default=-1)


def logged_values(folder: str, name: str) -> dict[int, float]:
    """The values of a scalar in a folder's metrics.json, by iteration."""
    entries = filter(None, map(_entry, _lines(folder)))
    return {entry["iteration"]: float(entry[name]) for entry in entries if name in entry}


def mend(folder: str, last: int) -> set[str]:
    """Drop torn lines of metrics.json, and those after the iteration from which a run continues.

    Returns:
        the names of what is logged at the iteration ``last``.
    """
    names: set[str] = set()
    lines, kept = _lines(folder), []
    for line in lines:
        entry = _entry(line)
        if entry is None or entry["iteration"] > last:
            continue
        kept.append(line.rstrip(b"\n") + b"\n")
        if entry["iteration"] == last:
            names.update(entry)
    if kept != lines:
        path = os.path.join(folder, METRICS)
        write_whole(path, lambda file: file.write(b"".join(kept)))
        logger.info(
            f"{path}: dropped {len(lines) - len(kept)} lines that are torn or after iteration {last}"
        )
    return names


def recent_scalars(storage: EventStorage) -> dict[str, Any]:
    """What ``restore_scalars`` needs: by name, the values of the last iterations, and whether their median
    is logged."""
    hints = storage.smoothing_hints()
    return {
        name: {"smooth": hints[name], "values": [list(pair) for pair in history.values()[-WINDOW:]]}
        for name, history in storage.histories().items()
    }


def restore_scalars(storage: EventStorage, scalars: dict[str, Any]) -> None:
    """Put back what ``recent_scalars`` gave."""
    for name, saved in scalars.items():
        for value, iteration in saved["values"]:
            # IterationTimer begins some steps later; until then the old time would get a line of its own.
            when = -1 if name == "time" else iteration
            storage.put_scalar(name, value, smoothing_hint=saved["smooth"], cur_iter=when)


def names_at(scalars: dict[str, Any], iteration: int) -> set[str]:
    """Names of those of ``recent_scalars`` whose last value is of this iteration."""
    return {name for name, saved in scalars.items() if saved["values"][-1][1] == iteration}


def _lines(folder: str) -> list[bytes]:
    path = os.path.join(folder, METRICS)
    if not os.path.isfile(path):
        return []
    with open(path, "rb") as file:
        return file.readlines()


def _entry(line: bytes) -> dict[str, Any] | None:
    """A line's content; None if it is torn."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(entry, dict) and isinstance(entry.get("iteration"), int)
    return entry if whole else None
