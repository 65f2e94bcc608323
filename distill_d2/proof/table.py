"""What came out: tables of each pair, as Markdown and json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..report.gain_table import gains_as_json, gains_as_markdown
from ..report.gains import Gains, gains_of
from ..report.kinds import Kind
from ..report.runs import Run
from ..report.tables import markdown, spread
from .data import digest
from .gates import Gate
from .jobs import Job
from .rows import Pair, Row
from .settings import Settings

DRAWS = 1000


@dataclass(frozen=True)
class Results:
    """Of a pair.

    Attributes:
        trained: all its finished trainings.
        tested: their evaluations on the test set.
        methods: gains over the student alone.
        controls: gains of the student alone that was trained longer.
    """

    pair: Pair
    trained: Sequence[Job]
    tested: Sequence[Job]
    methods: Gains
    controls: Gains


def results_of(pair: Pair, trained: Sequence[Job], tested: Sequence[Job], settings: Settings) -> Results:
    """Compare a pair's rows."""

    def gains(rows: Sequence[Row]) -> Gains:
        kinds = [Kind(row.title, [Run(str(job.folder)) for job in of(row, tested)]) for row in rows]
        truth = str(settings.photos.test)
        return gains_of(kinds, "bbox/AP", draws=DRAWS, truth=truth)

    methods = gains([pair.alone, *pair.methods])
    return Results(pair, trained, tested, methods, gains([pair.alone, *pair.controls]))


def write_tables(settings: Settings, results: Sequence[Results], gates: Sequence[Gate]) -> str:
    """Write OUTPUT/table.md and table.json, or for another test set table-<its name>.*.

    Returns:
        the Markdown.
    """
    parts = [as_markdown(each) for each in results]
    text = "\n\n".join([*parts, "\n".join(f"- {gate}" for gate in gates)]) + "\n"
    test = settings.photos.test
    content = {
        "test": {"file": str(test), "sha256": digest(test)},
        "gates": [{"gate": gate.text, "holds": gate.holds} for gate in gates],
        "pairs": {each.pair.name: _as_json(each) for each in results},
    }
    name = settings.photos.test_name.replace("test", "table", 1)
    (settings.output / f"{name}.md").write_text(text)
    (settings.output / f"{name}.json").write_text(f"{json.dumps(content, indent=1)}\n")
    return text


def as_markdown(results: Results) -> str:
    """What the rows reach, then what they gain."""
    rows = []
    for row in results.pair.rows:
        trained, tested = of(row, results.trained), of(row, results.tested)
        scores = [spread([job.score(metric) for job in tested]) for metric in ("AP", "AP50", "AP75")]
        rows.append([row.title, str(len(tested)), spread([job.ap() for job in trained]), *scores])
    header = ["", "runs", "AP, val", "AP, test", "AP50, test", "AP75, test"]
    title = results.pair.title
    parts = [markdown(title, header, rows), *map(gains_as_markdown, (results.methods, results.controls))]
    return "\n\n".join(part.rstrip() for part in parts)


def of(row: Row, jobs: Sequence[Job]) -> list[Job]:
    """The jobs of a row."""
    return [job for job in jobs if job.row == row]


def _as_json(results: Results) -> dict[str, Any]:
    def scores(jobs: Sequence[Job]) -> Mapping[str, Mapping[int, float]]:
        return {row.name: {job.seed: job.ap() for job in of(row, jobs)} for row in results.pair.rows}

    return {
        "AP on val": scores(results.trained),
        "AP on test": scores(results.tested),
        "methods": gains_as_json(results.methods),
        "controls": gains_as_json(results.controls),
    }
