"""What came out: a table of each pair, as Markdown and json."""

from __future__ import annotations

import contextlib
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from tabulate import tabulate

from ..report.bootstrap import Metric, bootstrap_gain, image_weights, matches_of
from ..report.statistics import UNKNOWN, Interval, holm, paired_interval
from .data import TEST, digest
from .gates import Gate
from .jobs import Job
from .rows import Pair, Row
from .settings import Settings

DRAWS = 2000
#: Of a wrong finding among all methods of a pair.
LEVEL = 0.05


@dataclass
class Line:
    """A row of a pair's table.

    Attributes:
        val, test: AP by seed.
        ap50: on the test set, by seed.
        gains: AP on the test set above the student alone of the same seed.
        over_seeds: the interval of the mean gain, by Student's t.
        over_images: the interval of the mean gain, on test images drawn anew.
        p: of ``over_seeds`` by Holm's correction for all methods of the pair; nan of other rows.
    """

    row: Row
    is_method: bool
    val: dict[int, float]
    test: dict[int, float]
    ap50: dict[int, float]
    gains: dict[int, float] = field(default_factory=dict)
    over_seeds: Interval = UNKNOWN
    over_images: Interval = UNKNOWN
    p: float = math.nan

    @property
    def verdict(self) -> str:
        """What both intervals say of a method, and whether that stands after Holm's correction."""
        if not self.is_method:
            return ""
        above = self.over_seeds.low > 0 and self.over_images.low > 0
        below = self.over_seeds.high < 0 and self.over_images.high < 0
        if not (above or below):
            return "open"
        return f"{'above' if above else 'below'} 0{', proven' if self.p < LEVEL else ''}"


def write_tables(
    settings: Settings,
    trained: Mapping[Pair, Sequence[Job]],
    tested: Mapping[Pair, Sequence[Job]],
    gates: Sequence[Gate],
) -> str:
    """Write OUTPUT/table.md and table.json, or for another test set table-<its name>.*.

    Args:
        trained: of each pair, all its finished trainings.
        tested: their evaluations on the test set, in the same order.

    Returns:
        the Markdown.
    """
    lines = {
        pair: lines_of(pair, jobs, tested[pair], settings.photos.test) for pair, jobs in trained.items()
    }
    parts = [f"{as_markdown(pair, found)}\n" for pair, found in lines.items()]
    text = "\n".join([*parts, *(f"- {gate}" for gate in gates), ""])
    name = settings.photos.test_name.replace("test", "table", 1)
    content = {
        "test": {"file": str(settings.photos.test), "sha256": digest(settings.photos.test)},
        "gates": [{"gate": gate.text, "holds": gate.holds} for gate in gates],
        "pairs": {pair.name: [_plain(line) for line in found] for pair, found in lines.items()},
    }
    (settings.output / f"{name}.md").write_text(text)
    (settings.output / f"{name}.json").write_text(f"{json.dumps(content, indent=1)}\n")
    return text


def lines_of(pair: Pair, trained: Sequence[Job], tested: Sequence[Job], truth: Path) -> list[Line]:
    """The rows of a pair's table.

    Args:
        truth: the annotations of the test set.
    """
    lines = [_line(pair, row, trained, tested) for row in pair.rows]
    lines = [line for line in lines if line.test]
    draws = _aps_on_draws(tested, truth)
    (alone,) = (line for line in lines if line.row == pair.alone)
    for line in lines:
        if line.row in (pair.teacher, pair.alone):
            continue
        seeds = [seed for seed in line.test if seed in alone.test]
        line.gains = {seed: line.test[seed] - alone.test[seed] for seed in seeds}
        line.over_seeds = paired_interval(list(line.gains.values()))
        own, others = ([draws[name, seed] for seed in seeds] for name in (line.row.name, alone.row.name))
        line.over_images = bootstrap_gain(own, others)
    methods = [line for line in lines if line.is_method]
    for line, p in zip(methods, holm([line.over_seeds.p for line in methods])):
        line.p = p
    return lines


def _line(pair: Pair, row: Row, trained: Sequence[Job], tested: Sequence[Job]) -> Line:
    def of(jobs: Sequence[Job], metric: str = "AP") -> dict[int, float]:
        return {job.seed: job.score(metric) for job in jobs if job.row == row}

    return Line(row, row in pair.methods, of(trained), of(tested), of(tested, "AP50"))


def _aps_on_draws(tested: Sequence[Job], truth: Path) -> dict[tuple[str, int], np.ndarray]:
    """AP of each run on the same draws of test images, (DRAWS,), by row and seed."""
    with contextlib.redirect_stdout(io.StringIO()):
        annotations = COCO(str(truth))
    weights = image_weights(len(annotations.imgs), DRAWS)
    found = {}
    for job in tested:
        file = job.folder / "inference" / TEST / "coco_instances_results.json"
        matches = matches_of(annotations, json.loads(file.read_text()), Metric.named("bbox", "AP"))
        found[job.row.name, job.seed] = matches.ap(weights)
    return found


def as_markdown(pair: Pair, lines: Sequence[Line]) -> str:
    """A pair's table."""
    header = ["", "seeds", "AP, val", "AP, test", "AP50", "gain by seed", "gain"]
    header += ["95 %, seeds", "95 %, images", "p (Holm)", ""]
    rows = [_cells(line) for line in lines]
    body = tabulate(rows, header, tablefmt="pipe", disable_numparse=True)
    return f"### {pair.title}\n\n{body}\n"


def _cells(line: Line) -> list[str]:
    gains = list(line.gains.values())
    return [
        line.row.title,
        str(len(line.test)),
        _spread(line.val),
        _spread(line.test),
        f"{statistics.fmean(line.ap50.values()):.1f}",
        ", ".join(f"{gain:+.2f}" for gain in gains),
        f"{statistics.fmean(gains):+.2f}" if gains else "",
        _ends(line.over_seeds),
        _ends(line.over_images),
        "" if math.isnan(line.p) else f"{line.p:.2g}",
        line.verdict,
    ]


def _spread(values: Mapping[int, float]) -> str:
    """A mean, and the standard deviation of several seeds."""
    mean = f"{statistics.fmean(values.values()):.2f}"
    return f"{mean} ± {statistics.stdev(values.values()):.2f}" if len(values) > 1 else mean


def _ends(interval: Interval) -> str:
    return "" if math.isnan(interval.low) else f"{interval.low:+.2f} to {interval.high:+.2f}"


def _plain(line: Line) -> dict[str, Any]:
    """For json, which knows no nan."""

    def ends(interval: Interval) -> list[float] | None:
        return None if math.isnan(interval.low) else [interval.low, interval.high]

    return {
        "row": line.row.name,
        "title": line.row.title,
        "val": line.val,
        "test": line.test,
        "test AP50": line.ap50,
        "gains": line.gains,
        "interval over seeds": ends(line.over_seeds),
        "interval over images": ends(line.over_images),
        "p by Holm": None if math.isnan(line.p) else line.p,
        "verdict": line.verdict,
    }
