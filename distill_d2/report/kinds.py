"""Runs of one kind: the same training with several seeds, which counts as one column."""

from __future__ import annotations

import glob
import math
import os
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .runs import Results, Run


@dataclass(frozen=True)
class Kind:
    """One or more runs under one name."""

    name: str
    runs: list[Run]

    def values(self, task: str, metric: str) -> list[float]:
        """A metric's values at the last evaluations of its runs; those that are not a number are left out."""
        values = [run.last.results.get(task, {}).get(metric, math.nan) for run in self.runs]
        return [value for value in values if math.isfinite(value)]

    def mean(self, task: str, metric: str) -> float:
        """nan without a value."""
        values = self.values(task, metric)
        return statistics.fmean(values) if values else math.nan

    def results(self) -> Results:
        """The means of all metrics of the first run."""
        first = self.runs[0].last.results
        return {task: {name: self.mean(task, name) for name in first[task]} for task in first}


def kinds_of(arguments: Sequence[str]) -> list[Kind]:
    """The kinds that the command line names.

    Args:
        arguments: each [NAME=]RUN, or [NAME=]RUN,RUN,... for several seeds; RUN may be a pattern ("out/pkd-*").

    Raises:
        OSError: a run does not exist; the message says what was expected.
        ValueError: two kinds have the same name; an argument names no run.
    """
    given = [_parts(argument) for argument in arguments]
    folders = [run.name for _, runs in given for run in runs]
    distinct = len(set(folders)) == len(folders)
    kinds = [
        Kind(name or ", ".join(run.name if distinct else run.path for run in runs), runs)
        for name, runs in given
    ]
    return with_baseline(kinds)


def kinds_of_folders(patterns: Sequence[str]) -> list[Kind]:
    """The kinds of runs that lie in one folder per kind, whose name is the kind's.

    Args:
        patterns: of the runs: "output/*/seed*".

    Raises:
        FileNotFoundError: a pattern matches nothing.
        OSError: what it matches is no run.
    """
    folders: dict[str, list[str]] = {}
    for pattern in patterns:
        found = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        paths = sorted(found, key=_by_numbers)
        if not paths:
            raise FileNotFoundError(
                f"--runs '{pattern}' matches nothing in '{os.getcwd()}'; expected a pattern of OUTPUT_DIRs, such "
                "as 'output/*/seed*'"
            )
        for path in paths:
            folders.setdefault(os.path.dirname(os.path.abspath(path)), []).append(path)
    names = [os.path.basename(folder) for folder in folders]
    distinct = len(set(names)) == len(names)
    return [
        Kind(name if distinct else os.path.relpath(folder), [Run(path) for path in dict.fromkeys(paths)])
        for name, (folder, paths) in zip(names, folders.items())
    ]


def with_baseline(kinds: Sequence[Kind], name: str = "") -> list[Kind]:
    """The kinds, with the one of this name first; "": as they are.

    Raises:
        ValueError: two have the same name, or none has this one.
    """
    names = [kind.name for kind in kinds]
    twice = [each for each in names if names.count(each) > 1]
    if twice:
        raise ValueError(f"two runs have the name '{twice[0]}'; name them by NAME=RUN")
    if name and name not in names:
        raise ValueError(f"--baseline '{name}' is none of the runs: {', '.join(names)}")
    return sorted(kinds, key=lambda kind: kind.name != name) if name else list(kinds)


def _by_numbers(path: str) -> list[tuple[int, str]]:
    """A key that sorts "seed10" after "seed2"."""
    return [(int(part or 0), text) for text, part in re.findall(r"(\D*)(\d*)", path)]


def _parts(argument: str) -> tuple[str, list[Run]]:
    name, equals, value = argument.partition("=")
    if not equals or os.path.exists(argument):
        name, value = "", argument
    if not value.strip(","):
        raise ValueError(f"'{argument}' names no run; expected RUN or NAME=RUN")
    words = [value] if os.path.exists(value) else [word for word in value.split(",") if word]
    paths = [path for word in words for path in sorted(glob.glob(word)) or [word]]
    return name, [Run(path) for path in dict.fromkeys(paths)]
