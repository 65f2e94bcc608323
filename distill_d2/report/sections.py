"""How the runs went, and what they were told: losses, gradients, settings, commands."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from detectron2.config import get_cfg

from ..config import add_distill_config
from ..messages import shortened
from ..run_files import COMMANDS, DISTILLATION_FILE, GRADIENTS, STUDENT_FILE
from .charts import Line, color_number, line_chart
from .html import folded, named, soft, table
from .roles import DISTILLED, Entry, distiller_keys
from .runs import Run, flat
from .tables import MISSING

_TOTAL = "total_loss"
# They differ between any two runs.
_OF_EVERY_RUN = ("OUTPUT_DIR", "train.output_dir")


def losses(entries: Sequence[Entry]) -> str:
    """A chart per kind of runs, of its first run; a term has the same color in all of them."""
    names = dict.fromkeys(name for entry in entries for name in entry.run.losses if name != _TOTAL)
    colors = {name: color_number(index) for index, name in enumerate(names)}
    charts = []
    for entry in entries:
        lines = [
            Line(name, points, colors.get(name, 0), dashed=name == _TOTAL)
            for name, points in entry.run.losses.items()
        ]
        charts.append(line_chart(entry.name, lines, "iterations", "loss", log=True, dots=False))
    text = "".join(charts)
    if not text:
        return soft("No metrics.json with losses is there.")
    note = "On a logarithmic scale. How large a term is says little about how strongly it teaches: see gradients."
    return soft(note) + f'<div class="charts">{text}</div>'


def gradients(entries: Sequence[Entry]) -> str:
    """The gradient of each loss of a distillation, beside that of the student's own losses."""
    measured = [entry for entry in entries if entry.run.gradients]
    distilled = [entry for entry in entries if entry.role == DISTILLED]
    if not measured:
        return soft(
            f"No {GRADIENTS} is there: these runs have not measured how strongly each term pulls."
            if distilled
            else "Nothing was distilled in these runs."
        )
    charts = [_gradient_chart(entry) for entry in measured]
    tables = [_gradient_table(entry) for entry in measured]
    note = (
        "Norms of gradients in the student's backbone and neck, in units of the gradient of the student's own "
        "losses: at 1 a loss pulls as strongly as the task."
    )
    return soft(note) + f'<div class="charts">{"".join(charts)}</div>' + "".join(tables)


def _gradient_chart(entry: Entry) -> str:
    """Ratios over iterations; "" of a single measurement, which the table has."""
    measured = [line for line in entry.run.gradients if line.get("task")]
    if len(measured) < 2:
        return ""
    names = dict.fromkeys(name for line in measured for name in line["losses"])
    task = Line("the task's", [(measured[i]["iteration"], 1.0) for i in (0, -1)], 0, dashed=True)
    ratios = [
        Line(
            name, [(m["iteration"], _ratio(m, m["losses"].get(name))) for m in measured], color_number(i)
        )
        for i, name in enumerate(names)
    ]
    return line_chart(entry.name, [task, *ratios], "iterations", "of the task's gradient", log=True)


def _ratio(line: dict[str, Any], gradient: float | None) -> float:
    """In units of the task's gradient; nan where one of the two is not known."""
    return gradient / line["task"] if gradient is not None and line.get("task") else math.nan


def _gradient_table(entry: Entry) -> str:
    """Each term at the first and the last measurement."""
    first, last = entry.run.gradients[0], entry.run.gradients[-1]
    rows = [[escape(name), *_term(first, name), *_term(last, name)] for name in first["terms"]]
    at = [
        f"{what} at {line['iteration']}"
        for line in (first, last)
        for what in ("value", "gradient", "ratio")
    ]
    weights = ", ".join(f"{name} {weight:g}" for name, weight in last.get("weights", {}).items())
    note = soft(f"Weights of the losses: {escape(weights)}.") if weights else ""
    return f"<h3>{named(entry.name, entry.color)}</h3>" + table(["term", *at], rows) + note


def _term(line: dict[str, Any], name: str) -> list[str]:
    term = line["terms"].get(name, {})
    value, gradient = term.get("value"), term.get("gradient")
    shown = [math.nan if each is None else each for each in (value, gradient, _ratio(line, gradient))]
    return [f"{each:.3g}" if math.isfinite(each) else MISSING for each in shown]


def settings(entries: Sequence[Entry]) -> str:
    """What differs between the detectors, what the distillations set, and folded all config files."""
    known = [entry for entry in entries if entry.run.settings]
    parts = []
    if len(known) > 1:
        rows = [row for row in _rows(known, _student_keys, _defaults()) if len(set(row[1:])) > 1]
        text = _key_table(known, rows) if rows else soft("None: their configs are equal.")
        parts.append(f"<h3>Differences between the detectors and their trainings</h3>{text}")
    distilled = [entry for entry in entries if distiller_keys(entry.run)]
    if distilled:
        text = _key_table(distilled, _rows(distilled, _changed_distiller_keys, {}))
        parts.append(f"<h3>Distillation: what is not the default</h3>{text}")
    for entry in entries:
        for name in (STUDENT_FILE, DISTILLATION_FILE):
            text = entry.run.text(name)
            if text:
                parts.append(folded(f"{entry.name}: {name}", f"<pre>{escape(text)}</pre>"))
    return "".join(parts) or soft("No config.yaml is there.")


def commands(entries: Sequence[Entry]) -> str:
    """The command lines of all runs."""
    parts = []
    for entry in entries:
        for run in entry.kind.runs:
            text = run.text(COMMANDS)
            shown = f'<pre class="commands">{escape(text)}</pre>' if text else soft(f"No {COMMANDS}.")
            parts.append(f"<h3>{named(entry.name, entry.color)}</h3>{soft(run.path)}{shown}")
    return "".join(parts)


def _rows(
    entries: Sequence[Entry], keys_of: Callable[[Run], dict[str, str]], defaults: dict[str, str]
) -> list[list[str]]:
    """A key and its value in each entry; of several seeds all values."""
    content = [[keys_of(run) for run in entry.kind.runs] for entry in entries]
    keys = sorted({key for runs in content for run in runs for key in run})

    def value(key: str, runs: Sequence[dict[str, str]]) -> str:
        return ", ".join(dict.fromkeys(run.get(key, defaults.get(key, MISSING)) for run in runs))

    return [[key, *(value(key, runs) for runs in content)] for key in keys]


def _key_table(entries: Sequence[Entry], rows: Sequence[Sequence[str]]) -> str:
    cells = [[f'<span class="value">{escape(text)}</span>' for text in row] for row in rows]
    return table(["key", *(entry.name for entry in entries)], cells, "left keys")


def _student_keys(run: Run) -> dict[str, str]:
    return {
        key: _text(value)
        for key, value in run.settings.items()
        if key not in _OF_EVERY_RUN and not key.startswith("distiller.")
    }


def _changed_distiller_keys(run: Run) -> dict[str, str]:
    """Those of MODEL.DISTILLER that are not the default."""
    defaults = _defaults()
    keys = {key: _text(value) for key, value in distiller_keys(run).items()}
    return {key: text for key, text in keys.items() if defaults.get(f"MODEL.DISTILLER.{key}") != text}


@functools.lru_cache(maxsize=1)
def _defaults() -> dict[str, str]:
    """Of all keys; a run's config.yaml leaves those out that detectron2 lacks."""
    config = get_cfg()
    add_distill_config(config)
    return {key: _text(value) for key, value in flat(config)}


def _text(value: Any) -> str:
    return shortened(list(value) if isinstance(value, tuple) else value, 160)
