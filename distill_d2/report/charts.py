"""Charts as SVG, drawn with the colors of the page's style: lines over iterations, and dots per class."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

#: Colors of the style: c0 is that of the teacher.
COLORS = 9
_WIDTH, _HEIGHT = 460, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 14, 10, 38
_MOST_POINTS = 250
_MOST_DOTS = 40  # points of a line
_SMALLEST = 1e-12


@dataclass(frozen=True)
class Line:
    """One line of a chart: a name, (x, y) points, the number of a color, and whether it is dashed."""

    name: str
    points: Sequence[tuple[float, float]]
    color: int
    dashed: bool = False


def color_number(index: int) -> int:
    """The color of the index-th line that is not the teacher's, from 1."""
    return 1 + index % (COLORS - 1)


def line_chart(
    title: str, lines: Sequence[Line], x_label: str, y_label: str, log: bool = False, dots: bool = True
) -> str:
    """A figure with axes and a legend; "" without points.

    Args:
        log: a logarithmic scale of y, on which values that are not positive are left out.
        dots: mark the points, unless there are many.
    """
    lines = [
        Line(line.name, thinned(_shown(line.points, log)), line.color, line.dashed) for line in lines
    ]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x_ticks = ticks(0.0, max(xs))
    y_ticks = log_ticks(min(ys), max(ys)) if log else ticks(min(ys), max(ys))
    x_ticks = [x for x in x_ticks if x <= max(xs)]
    across = _scale(x_ticks[0], max(xs), _LEFT, _WIDTH - _RIGHT)
    up = _scale(min(y_ticks[0], *ys), max(y_ticks[-1], *ys), _HEIGHT - _BOTTOM, _TOP, log)
    parts = [_axes(x_ticks, y_ticks, across, up, x_label, y_label)]
    for line in lines:
        places = [(across(x), up(y)) for x, y in line.points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="line c{line.color}{" dashed" * line.dashed}" points="{path}"/>')
        alone = len(places) == 1  # without a dot nothing is seen of it
        if alone or dots and not line.dashed and len(places) <= _MOST_DOTS:
            parts += [_dot(line, place, point) for place, point in zip(places, line.points)]
    legend = "".join(
        f'<li><span class="swatch c{line.color}{" dashed" * line.dashed}"></span>{escape(line.name)}</li>'
        for line in lines
    )
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f'<ul class="legend">{legend}</ul></figure>'
    )


def dot_rows(rows: Sequence[tuple[str, Sequence[tuple[str, int, float]]]]) -> str:
    """A row per class, with a dot per kind on a scale from 0 to 100.

    Args:
        rows: a name, and (kind, color, value) of each kind; values that are not finite have no dot.
    """
    texts = [_track(escape(name), _dots(values)) for name, values in rows]
    scale = "".join(f'<i style="left:{value}%">{value}</i>' for value in range(0, 101, 25))
    return f'<div class="dots">{"".join(texts)}{_track("", scale, "scale")}</div>'


def _track(label: str, marks: str, kind: str = "") -> str:
    return f'<div class="row {kind}"><span>{label}</span><div class="track">{marks}</div></div>'


def _dots(values: Sequence[tuple[str, int, float]]) -> str:
    known = [value for value in values if math.isfinite(value[2])]
    if not known:
        return ""
    low, high = (pick(value for _, _, value in known) for pick in (min, max))
    dots = [
        f'<i class="c{color}" style="left:{value:.2f}%" title="{escape(kind)}: {value:.1f}"></i>'
        for kind, color, value in known
    ]
    return f'<b style="left:{low:.2f}%;width:{high - low:.2f}%"></b>{"".join(dots)}'


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most _MOST_POINTS points: medians of neighbors."""
    size = math.ceil(len(points) / _MOST_POINTS)
    if size <= 1:
        return list(points)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], statistics.median(y for _, y in group)) for group in groups]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers from at most ``low`` to at least ``high``."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two positive numbers, or with 2 and 5 between them where these are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    found = [factor * 10.0**power for power in powers for factor in factors]
    return [value for value in found if low <= value <= high] or [low]


def _shown(points: Sequence[tuple[float, float]], log: bool) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(y) and (y > _SMALLEST or not log)]


def _scale(low: float, high: float, start: float, end: float, log: bool = False):
    """From values to coordinates."""
    if log:
        low, high = math.log10(low), math.log10(high)

    def place(value: float) -> float:
        value = math.log10(value) if log else value
        return start + (end - start) * (value - low) / ((high - low) or 1.0)

    return place


def _axes(x_ticks, y_ticks, across, up, x_label: str, y_label: str) -> str:
    parts = []
    for value in y_ticks:
        y = up(value)
        if _TOP - 1 <= y <= _HEIGHT - _BOTTOM + 1:
            parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
            parts.append(f'<text class="end" x="{_LEFT - 6}" y="{y + 4:.1f}">{number(value)}</text>')
    for value in x_ticks:
        x = across(value)
        parts.append(
            f'<text class="middle" x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}">{number(value)}</text>'
        )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="middle" x="{middle}" y="{_HEIGHT - 6}">{escape(x_label)}</text>')
    half = (_HEIGHT - _BOTTOM) / 2
    place = f'x="12" y="{half}" transform="rotate(-90 12 {half})"'
    parts.append(f'<text class="middle" {place}>{escape(y_label)}</text>')
    return "".join(parts)


def _dot(line: Line, place: tuple[float, float], point: tuple[float, float]) -> str:
    text = f"{line.name}: {number(point[1])} at {number(point[0])}"
    x, y = place
    return f'<circle class="c{line.color}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{escape(text)}</title></circle>'


def number(value: float) -> str:
    """A number in few characters: 90k, 0.01, 24.9."""
    if value and abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"
