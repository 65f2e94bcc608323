"""Gains over a baseline as a table, and as json."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from .gains import Gain, Gains
from .statistics import Interval
from .tables import MISSING, markdown, spread

_COLUMNS = ["seeds", "mean", "gain per seed", "gain", "95 %, seeds", "p", "95 %, images", "p", "proven"]


def gains_as_markdown(gains: Gains) -> str:
    """A table with a row per kind of runs, and notes below it."""
    metric = f"{gains.task}/{gains.metric}"
    rows = [[gains.baseline, ", ".join(gains.seeds), spread(gains.values), *[""] * 7]]
    rows += [[row.name, *_cells(row)] for row in gains.rows]
    title = f"{metric}: gain over {gains.baseline}"
    lines = [markdown(title, ["", *_COLUMNS], rows), f"{_legend(gains)}\n"]
    return "\n".join([*lines, *(f"- {note}" for note in gains.notes), *[""] * bool(gains.notes)])


def gains_as_json(gains: Gains) -> dict[str, Any]:
    """All numbers; None for those that are not known."""
    content = asdict(gains)
    methods = {row.pop("name"): row for row in content.pop("rows")}
    for row, gain in zip(methods.values(), gains.rows):
        row["proven"] = gain.proven
    return _without_nan({**content, "methods": methods})


def _cells(row: Gain) -> list[str]:
    return [
        ", ".join(row.seeds),
        spread(row.values),
        ", ".join(f"{gain:+.2f}" for gain in row.gains) or MISSING,
        f"{row.gain:+.2f}",
        _interval(row.over_seeds),
        _p(row.p_over_seeds),
        _interval(row.over_images),
        _p(row.p_over_images),
        row.proven or MISSING,
    ]


def _interval(interval: Interval) -> str:
    return MISSING if math.isnan(interval.low) else f"{interval.low:+.2f} to {interval.high:+.2f}"


def _p(value: float) -> str:
    return MISSING if math.isnan(value) else f"{value:.3f}"


def _legend(gains: Gains) -> str:
    images = (
        f"over test images: {gains.draws} draws of them with replacement, mean of the seeds"
        if gains.draws
        else "over test images: not computed (--bootstrap 1000)"
    )
    return (
        "Intervals of the gain over seeds: Student's t of the differences, seed by seed; "
        f"{images}. p is corrected for {len(gains.rows)} comparison{'s' * (len(gains.rows) > 1)} (Holm). Proven: "
        "both p are below 0.05."
    )


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
