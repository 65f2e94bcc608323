"""One run of the proof: its command line, its folder, and how far it has come."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..report.runs import Run, evaluation_of, read_lines
from ..run_files import EVALUATIONS, METRICS
from .rows import Pair, Row

FINAL = "model_final.pth"
SETTINGS = "proof.json"
CONSOLE = "console.txt"
_MOST_CHANGES = 5


@dataclass(frozen=True)
class Job:
    """A run of ``distill-d2``.

    Attributes:
        pair, row, seed: whose.
        folder: its OUTPUT_DIR.
        words: the arguments of distill-d2.
        iterations: of a training; 0 for an evaluation.
        settings: what a finished run must agree with, to count as this one.
        weights: that an evaluation reads.
    """

    pair: Pair
    row: Row
    seed: int
    folder: Path
    words: tuple[str, ...]
    iterations: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    weights: Path | None = None

    @property
    def name(self) -> str:
        task = "" if self.iterations else f"{self.folder.parents[2].name} of "
        return f"{task}{self.pair.name}/{self.row.name}/seed{self.seed}"

    @property
    def command(self) -> str:
        return f"distill-d2 {shlex.join(self.words)}"

    def finished(self) -> bool:
        """Whether its results are there, and of this training.

        Raises:
            ValueError: the folder holds a run of other settings.
        """
        if self.weights is not None:
            return _is_newer(self.folder / EVALUATIONS, self.weights)
        self._check_settings()
        return (self.folder / FINAL).is_file() and self._evaluated()

    def prepare(self) -> None:
        """Make the folder, and note the settings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.settings:
            (self.folder / SETTINGS).write_text(f"{json.dumps(self.settings, indent=1)}\n")

    def iteration(self) -> int:
        """How many iterations are logged."""
        return max((line["iteration"] + 1 for line in self._lines() if "total_loss" in line), default=0)

    def seconds_per_iteration(self) -> float | None:
        """The mean over the run; None before something is logged."""
        times = [line["time"] for line in self._lines() if "time" in line]
        return sum(times) / len(times) if times else None

    def ap(self) -> float:
        """COCO's AP of boxes at its end."""
        return self.score("AP")

    def score(self, metric: str) -> float:
        """A metric of boxes, such as "AP50", at its end."""
        return Run(str(self.folder)).last.results["bbox"][metric]

    def _lines(self) -> list[dict[str, Any]]:
        path = self.folder / METRICS
        return read_lines(path) if path.is_file() else []

    def _evaluated(self) -> bool:
        found = [evaluation_of(line) for line in self._lines()]
        return any(each.results and each.iterations >= self.iterations for each in found)

    def _check_settings(self) -> None:
        path = self.folder / SETTINGS
        if not (path.is_file() and self._lines()):  # nothing is trained yet
            return
        before = json.loads(path.read_text())
        now = json.loads(json.dumps(self.settings))  # tuples become lists
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if changed:
            told = [f"{key} {before.get(key)} -> {now.get(key)}" for key in changed[:_MOST_CHANGES]]
            more = "; ..." if len(changed) > _MOST_CHANGES else ""
            raise ValueError(
                f"'{self.folder}' holds a run of other settings ({'; '.join(told)}{more}). Give another "
                "--output, or remove that folder to train again"
            )


def mean_ap(jobs: Sequence[Job]) -> float:
    """The mean of finished runs' AP."""
    return statistics.fmean(job.ap() for job in jobs)


def noted_length(folder: Path) -> int:
    """The iterations of the training that was begun in a folder; 0 without one."""
    path = folder / SETTINGS
    return json.loads(path.read_text())["SOLVER.MAX_ITER"] if path.is_file() else 0


def _is_newer(path: Path, than: Path) -> bool:
    return path.is_file() and than.is_file() and path.stat().st_mtime >= than.stat().st_mtime
