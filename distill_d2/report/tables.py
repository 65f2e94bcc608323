"""Tables of kinds of runs, class by class."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from tabulate import tabulate

from .kinds import Kind

MISSING = "-"


@dataclass(frozen=True)
class Table:
    """Metrics of one task, or one metric of its classes.

    Attributes:
        task: "bbox".
        metric: "" for a table with a row per metric; "AP50" for one with a row per class.
        rows: names of metrics, or of classes.
    """

    task: str
    metric: str
    rows: list[str]

    @property
    def title(self) -> str:
        return f"{self.task}, {self.metric} per class" if self.metric else self.task

    def key(self, row: str) -> str:
        """The name of a row's metric in results."""
        return f"{self.metric}-{row}" if self.metric else row


def tables_of(kinds: Sequence[Kind]) -> list[Table]:
    """The tables of all tasks that two kinds share, or the only one has.

    Raises:
        ValueError: there are none, or a run has no evaluation.
    """
    results = [kind.results() for kind in kinds]
    tables = []
    for task in dict.fromkeys(task for result in results for task in result):
        if sum(task in result for result in results) >= min(2, len(kinds)):
            names = dict.fromkeys(name for result in results for name in result.get(task, ()))
            known = [n for n in names if any(kind.values(task, n) for kind in kinds)]
            tables += _split(task, known or ["AP"])
    if not tables:
        tasks = "; ".join(f"{kind.name}: {', '.join(r)}" for kind, r in zip(kinds, results))
        raise ValueError(f"the runs have no metrics in common ({tasks})")
    return tables


def _split(task: str, names: list[str]) -> list[Table]:
    """One table for the metrics, and one for each metric that classes have."""
    classes: dict[str, list[str]] = {}
    for name in names:
        metric, hyphen, row = name.partition("-")
        if hyphen:
            classes.setdefault(metric, []).append(row)
    means = Table(task, "", [name for name in names if "-" not in name])
    return [means, *(Table(task, metric, rows) for metric, rows in classes.items())]


def as_markdown(kinds: Sequence[Kind]) -> str:
    """All tables as Markdown, which is also readable as it is. Raises ValueError as ``tables_of``."""
    header = header_of(kinds)
    return "\n".join(
        markdown(
            table.title,
            ["class" if table.metric else "", *header],
            [[row, *cells(kinds, table, row)] for row in table.rows],
        )
        for table in tables_of(kinds)
    )


def markdown(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table under a heading."""
    align = ("left", *("right" for _ in columns[1:]))
    body = tabulate(rows, columns, tablefmt="pipe", disable_numparse=True, colalign=align)
    return f"### {title}\n\n{body}\n"


def as_values(kinds: Sequence[Kind]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """{task: {metric: {kind: values of its runs}}}. Raises ValueError as ``tables_of``."""
    content: dict[str, dict[str, dict[str, list[float]]]] = {}
    for table in tables_of(kinds):
        for key in map(table.key, table.rows):
            values = {kind.name: kind.values(table.task, key) for kind in kinds}
            content.setdefault(table.task, {})[key] = values
    return content


def weights_of(kinds: Sequence[Kind]) -> dict[str, dict[str, list[float]]]:
    """{loss: {kind: weights that GRADIENT_RATIO has set in its runs}}."""
    found: dict[str, dict[str, list[float]]] = {}
    for kind in kinds:
        for run in kind.runs:
            for loss, weight in run.weights.items():
                found.setdefault(loss, {}).setdefault(kind.name, []).append(weight)
    return found


def weights_as_markdown(kinds: Sequence[Kind]) -> str:
    """A table of them; "" if there are none."""
    names = [kind.name for kind in kinds]
    rows = [
        [loss, *(", ".join(f"{w:g}" for w in of_kind.get(name, ())) or MISSING for name in names)]
        for loss, of_kind in weights_of(kinds).items()
    ]
    return markdown("weights by GRADIENT_RATIO", ["loss", *names], rows) if rows else ""


def header_of(kinds: Sequence[Kind]) -> list[str]:
    """Names of the columns: kinds, and their differences to the first."""
    first, *others = [kind.name for kind in kinds]
    return [first, *others, *(f"{name} - {first}" for name in others)]


def cells(kinds: Sequence[Kind], table: Table, row: str) -> list[str]:
    """A row: each kind's mean, with the standard deviation of several runs, and differences of means."""
    key = table.key(row)
    first = kinds[0].mean(table.task, key)
    differences = [kind.mean(table.task, key) - first for kind in kinds[1:]]
    shown = [f"{value:+.2f}" if math.isfinite(value) else MISSING for value in differences]
    return [*(cell(kind, table.task, key) for kind in kinds), *shown]


def cell(kind: Kind, task: str, metric: str, digits: int = 2) -> str:
    """A mean, "40.0 ± 1.2" of several runs."""
    return spread(kind.values(task, metric), digits)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """A mean, "40.0 ± 1.2" of several values with their standard deviation."""
    if not values:
        return MISSING
    text = f"{statistics.fmean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text
