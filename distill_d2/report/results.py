"""What came out of the runs: a verdict, tables, AP over iterations, AP per class, size and speed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from .charts import Line, dot_rows, line_chart, number
from .gain_table import header_of, legend_of, rows_of, title_of
from .gains import gains_of
from .html import folded, named, signed, soft, table
from .models import Cost
from .roles import ALONE, DISTILLED, TEACHER, Entry
from .tables import MISSING, Table, cell


def verdict(entries: Sequence[Entry], task: str) -> str:
    """What distillation has brought, in words; "" without a student alone or a distillation."""
    alone, teacher = _first(entries, ALONE), _first(entries, TEACHER)
    distilled = [entry for entry in entries if entry.role == DISTILLED]
    if alone is None or not distilled:
        return ""
    base = alone.kind.mean(task, "AP")
    top = teacher.kind.mean(task, "AP") if teacher else math.nan
    lines = []
    for entry in distilled:
        value = entry.kind.mean(task, "AP")
        if not math.isfinite(value - base):
            continue
        where = "above" if value >= base else "below"
        text = (
            f" reaches {value:.1f} {task} AP, {abs(value - base):.1f} {where} {alone.name} ({base:.1f})"
        )
        if teacher and top > base:
            share = 100 * (value - base) / (top - base)
            text += f", {share:.0f} % of the way to {teacher.name} ({top:.1f})"
        lines.append(f'<p class="lead"><b>{escape(entry.name)}</b>{escape(text)}.</p>')
    if lines and all(len(entry.kind.runs) == 1 for entry in [alone, *distilled]):
        lines.append(
            soft("One run of each: on small data another seed alone can change AP by several points.")
        )
    return "".join(lines)


def result_tables(entries: Sequence[Entry], tables: Sequence[Table]) -> str:
    """A table per task, with a row per kind of runs and its difference to the student alone, or to the first."""
    base = _first(entries, ALONE) or entries[0] if len(entries) > 1 else None
    parts = []
    for task_table in tables:
        if task_table.metric:
            continue
        first, *others = task_table.rows
        header = ["", first, *([f"to {base.name}"] if base else []), *others, ""]
        rows = [_result_row(entry, base, task_table) for entry in entries]
        parts.append(f"<h3>{escape(task_table.title)}</h3>{table(header, rows, 'named')}")
    outside = [entry for entry in entries if entry.run.last.weights]
    parts += [soft(f"{e.name}: evaluated alone, with {e.run.last.weights}.") for e in outside]
    return "".join(parts)


def gains(entries: Sequence[Entry], task: str) -> str:
    """How sure the gains over the student alone are, where there are several seeds; else ""."""
    alone = _first(entries, ALONE)
    kinds = [entry.kind for entry in entries if entry.role == DISTILLED]
    kinds = [alone.kind, *kinds] if alone and kinds else []
    known = all(len(kind.values(task, "AP")) == len(kind.runs) for kind in kinds)
    if not (known and any(len(kind.runs) > 1 for kind in kinds)):
        return ""
    found = gains_of(kinds, f"{task}/AP")
    rows = [[escape(cell) for cell in row] for row in rows_of(found)]
    notes = "".join(map(soft, [legend_of(found), *found.notes]))
    return f"<h3>{escape(title_of(found))}</h3>{table(header_of(found), rows)}{notes}"


def _result_row(entry: Entry, base: Entry | None, task_table: Table) -> list[str]:
    task, (first, *others) = task_table.task, task_table.rows
    row = [named(entry.name, entry.color), f"<b>{cell(entry.kind, task, first, 1)}</b>"]
    if base is not None:
        difference = entry.kind.mean(task, first) - base.kind.mean(task, first)
        text = signed(difference, f"{difference:+.1f}") if math.isfinite(difference) else MISSING
        row.append("" if entry is base else text)
    return [*row, *(cell(entry.kind, task, name, 1) for name in others), entry.role]


def curves(entries: Sequence[Entry], tables: Sequence[Table]) -> str:
    """A chart per task; runs of one kind share a color."""
    tasks = dict.fromkeys(task_table.task for task_table in tables)
    text = "".join(line_chart(f"{t} AP", _ap_lines(entries, t), "iterations", "AP") for t in tasks)
    if not text:
        return soft("No evaluation during a training is known.")
    single = all(len(run.evaluations) == 1 for entry in entries for run in entry.kind.runs)
    more = soft("TEST.EVAL_PERIOD evaluates on the way, too.") if single else ""
    best = "".join(soft(line) for entry in entries for line in _earlier_best(entry, list(tasks)[0]))
    return f'<div class="charts">{text}</div>{best}{more}'


def _earlier_best(entry: Entry, task: str) -> list[str]:
    """A sentence for each run that was better before its end."""
    found = []
    for run in entry.kind.runs:
        points = run.curve(task, "AP")
        x, y = max(points, key=lambda point: point[1], default=(0.0, 0.0))
        if points and y > points[-1][1]:
            found.append(f"{run.name} was best after {number(x)} iterations, with {y:.1f} {task} AP.")
    return found


def _ap_lines(entries: Sequence[Entry], task: str) -> list[Line]:
    """AP in training; what was evaluated alone is a level beside the others."""
    lines = []
    for entry in entries:
        for run in entry.kind.runs:
            name = run.name if len(entry.kind.runs) > 1 else entry.name
            lines.append(Line(name, run.curve(task, "AP"), entry.color))
    longest = max((x for line in lines for x, _ in line.points), default=0.0)
    for entry in entries:
        if longest and not entry.run.last.iterations:
            level = entry.kind.mean(task, "AP")
            lines.append(Line(entry.name, [(0.0, level), (longest, level)], entry.color, dashed=True))
    return lines


def classes(entries: Sequence[Entry], tables: Sequence[Table]) -> str:
    """Each class on a scale, and folded the table with the numbers."""
    parts = []
    for class_table in tables:
        if not class_table.metric:
            continue
        task = class_table.task
        rows = [
            (row, [(e.name, e.color, e.kind.mean(task, class_table.key(row))) for e in entries])
            for row in class_table.rows
        ]
        numbers = [
            [escape(row), *(cell(entry.kind, task, class_table.key(row), 1) for entry in entries)]
            for row in class_table.rows
        ]
        legend = "".join(f"<li>{named(entry.name, entry.color)}</li>" for entry in entries)
        parts.append(
            f'<h3>{escape(class_table.title)}</h3><ul class="legend">{legend}</ul>{dot_rows(rows)}'
        )
        header = ["class", *(entry.name for entry in entries)]
        parts.append(folded(f"{class_table.title}: numbers", table(header, numbers)))
    return "".join(parts) or soft("The evaluations have no results per class.")


def cost_table(entries: Sequence[Entry], costs: Mapping[str, Cost]) -> str:
    """Size and speed of each detector."""
    known = [entry for entry in entries if entry.name in costs]
    base = _first(known, TEACHER)
    rows = []
    for entry in known:
        cost = costs[entry.name]
        row = [
            named(entry.name, entry.color),
            f"{cost.parameters / 1e6:.2f} M",
            f"{cost.megabytes:.1f} MB",
            f"{cost.milliseconds:.1f} ms",
        ]
        if base is not None:
            faster = costs[base.name].milliseconds / cost.milliseconds
            row.append("" if entry is base else f"{faster:.1f} times as fast")
        rows.append(row)
    header = ["", "parameters", "weights", "per image"]
    return table(header + [f"beside {base.name}"] if base else header, rows)


def _first(entries: Sequence[Entry], role: str) -> Entry | None:
    return next((entry for entry in entries if entry.role == role), None)
