"""What a run has left in its OUTPUT_DIR: evaluations, losses, gradients, settings, commands."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..run_files import DISTILLATION_FILE, EVALUATIONS, GRADIENTS, METRICS, STUDENT_FILE, WEIGHT
from ..safe_yaml import read_yaml

Metrics = dict[str, float]  # of one task, by name: "AP", "AP50-dog"
Results = dict[str, Metrics]  # by task: "bbox"; "voc_2007_test/bbox" where there are several datasets

# A function in the config.yaml of a LazyConfig; here it stays a text.
_NAME_OF_CODE = r"!!python/name:(\S+) ''"


@dataclass(frozen=True)
class Evaluation:
    """One evaluation.

    Attributes:
        iterations: of the training before it; 0 for one outside of training.
        weights: of one outside of training, else "".
    """

    iterations: int
    results: Results
    weights: str = ""


class Run:
    """A run's files; each is read when it is asked for."""

    def __init__(self, path: str):
        """
        Args:
            path: the OUTPUT_DIR of a run, or one of its files of evaluations.

        Raises:
            OSError: there are no evaluations; the message says what was expected.
        """
        self.path = path
        place = Path(path)
        self.folder = place if place.is_dir() else place.parent
        names = [METRICS, EVALUATIONS] if place.is_dir() else [place.name] * (place.suffix == ".json")
        self._files = [self.folder / name for name in names if (self.folder / name).is_file()]
        if not self._files:
            raise FileNotFoundError(_what_is_there(place))

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """The scalars of metrics.json, an entry per logged iteration; [] without this file.

        Raises:
            ValueError: it holds something else.
        """
        path = self.folder / METRICS
        return read_lines(path) if path in self._files else []

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """Those in training, in their order; without any, those outside of training.

        Raises:
            ValueError: there are none, or a file holds something else.
        """
        for path in self._files:
            entries = self.lines if path.name == METRICS else read_lines(path)
            found = [evaluation_of(entry) for entry in entries]
            found = [evaluation for evaluation in found if evaluation.results]
            if found:
                return found
        names = " and ".join(f"'{path}'" for path in self._files)
        raise ValueError(f"{names}: no evaluation is there; the training has not reached one")

    @property
    def last(self) -> Evaluation:
        return self.evaluations[-1]

    def curve(self, task: str, metric: str) -> list[tuple[float, float]]:
        """(iterations trained, value) of each evaluation in training."""
        points = [(e.iterations, e.results.get(task, {}).get(metric)) for e in self.evaluations]
        return [(x, y) for x, y in points if x > 0 and y is not None and math.isfinite(y)]

    @cached_property
    def losses(self) -> dict[str, list[tuple[float, float]]]:
        """(iterations trained, value) of each loss term, by its name."""
        found: dict[str, list[tuple[float, float]]] = {}
        for line in self.lines:
            if "iteration" not in line:
                continue
            for name, value in line.items():
                if "loss" in name and "/" not in name and isinstance(value, (int, float)):
                    found.setdefault(name, []).append((line["iteration"] + 1, value))
        return found

    @cached_property
    def gradients(self) -> list[dict[str, Any]]:
        """The entries of GRADIENTS: iteration, and by term its value and the norm of its gradient; [] without
        this file."""
        path = self.folder / GRADIENTS
        return read_lines(path) if path.is_file() else []

    @cached_property
    def weights(self) -> dict[str, float]:
        """The weights that GRADIENT_RATIO has set, by the loss's name; the last ones."""
        scalars = {name: value for line in self.lines for name, value in line.items()}
        return {
            name.removeprefix(WEIGHT): value
            for name, value in scalars.items()
            if name.startswith(WEIGHT)
        }

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The student's config, by full key; {} without one."""
        return self._config(STUDENT_FILE)

    @cached_property
    def distillation(self) -> dict[str, Any]:
        """The whole config of a distillation, by full key; {} for other runs."""
        return self._config(DISTILLATION_FILE)

    def text(self, name: str) -> str:
        """The text of one of its files; "" without it."""
        path = self.folder / name
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def _config(self, name: str) -> dict[str, Any]:
        text = re.sub(_NAME_OF_CODE, r"\1", self.text(name))
        return dict(flat(read_yaml(text, f"'{self.folder / name}'") or {}))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The entries of a file with a line of json each; without the last one if a killed run has left it torn.

    Raises:
        ValueError: a line is something else.
    """
    entries = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(True), start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            if not line.endswith("\n"):
                break
            raise ValueError(f"'{path}', line {number}, is not JSON: {error}") from error
        if not isinstance(entry, dict):
            raise ValueError(f"'{path}', line {number}, holds no numbers by name")
        entries.append(entry)
    return entries


def evaluation_of(entry: dict[str, Any]) -> Evaluation:
    """The evaluation among the scalars of an entry; its results are {} if there is none."""
    found: Results = {}
    for key, value in entry.items():
        task, _, metric = key.rpartition("/")
        if task and isinstance(value, (int, float)):
            found.setdefault(task, {})[metric] = value
    results = {task: metrics for task, metrics in found.items() if "AP" in metrics}
    # The evaluation at the end comes after the last iteration, and has a line of its own.
    iterations = entry.get("iteration", 0) + ("total_loss" in entry)
    return Evaluation(iterations, results, entry.get("weights", ""))


def flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and values of nested dicts: ("SOLVER.BASE_LR", 0.01)."""
    if not isinstance(node, dict):
        yield prefix.removesuffix("."), node
        return
    for name, value in node.items():
        yield from flat(value, f"{prefix}{name}.")


def _what_is_there(place: Path) -> str:
    expected = "expected the OUTPUT_DIR of a training or evaluation"
    if place.is_file():
        return f"'{place}' is no file of evaluations ({METRICS}, {EVALUATIONS}); {expected}"
    if not place.is_dir():
        return f"'{place}' does not exist; {expected}"
    runs = sorted(path.parent.name for path in place.glob(f"*/{METRICS}"))
    inside = f"; runs are in it: {', '.join(runs[:10])}" if runs else ""
    return f"'{place}' holds neither {METRICS} nor {EVALUATIONS}; {expected}{inside}"
