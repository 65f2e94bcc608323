"""Gains over a baseline as a table, and as json."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from .gains import Gain, Gains
from .statistics import Interval
from .tables import MISSING, markdown, spread

_OVER_SEEDS = ["seeds", "mean", "gain per seed", "gain", "95 %, seeds", "p"]
_OVER_IMAGES = ["95 %, images", "p", "proven"]


def gains_as_markdown(gains: Gains) -> str:
    """A table with a row per kind of runs, and notes below it."""
    notes = "".join(f"\n- {note}" for note in gains.notes)
    return f"{markdown(title_of(gains), header_of(gains), rows_of(gains))}\n{legend_of(gains)}\n{notes}".rstrip()


def gains_as_json(gains: Gains) -> dict[str, Any]:
    """All numbers; None for those that are not known."""
    content = asdict(gains)
    methods = {row.pop("name"): row for row in content.pop("rows")}
    for row, gain in zip(methods.values(), gains.rows):
        row["proven"] = gain.proven
    return _without_nan({**content, "methods": methods})


def title_of(gains: Gains) -> str:
    return f"{gains.task}/{gains.metric}: gain over {gains.baseline}"


def header_of(gains: Gains) -> list[str]:
    return ["", *_OVER_SEEDS, *(_OVER_IMAGES if gains.draws else [])]


def rows_of(gains: Gains) -> list[list[str]]:
    """The baseline, and each kind of runs beside it; texts."""
    width = len(header_of(gains))
    base = [gains.baseline, ", ".join(gains.seeds), spread(gains.values)]
    rows = [base + [""] * (width - len(base))]
    return rows + [[row.name, *_cells(row)][:width] for row in gains.rows]


def legend_of(gains: Gains) -> str:
    """What the columns are, in words."""
    parts = ["95 %, seeds: Student's interval of the gain over seeds"]
    if gains.draws:
        parts.append(
            f"95 %, images: over {gains.draws} draws of the test images, of the mean of the seeds"
        )
    if len(gains.rows) > 1:
        parts.append(f"p: corrected for {len(gains.rows)} comparisons (Holm)")
    if gains.draws:
        parts.append("proven: both p are below 0.05")
    return "; ".join(parts) + "."


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
    if math.isnan(value):
        return MISSING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
