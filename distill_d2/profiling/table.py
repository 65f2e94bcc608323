"""Profiles as a table, and as plain values for a json."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from tabulate import tabulate

from .measure import Profile
from .parts import PARTS, REST
from .timing import time_ratio

_TIME = "ms per image"


def table(profiles: Mapping[str, Profile], teachers: Mapping[str, str]) -> str:
    """A column for each detector, with the ratio to its teacher in parentheses.

    Args:
        teachers: titles of teachers by those of their students.
    """
    columns = {title: _column(each) for title, each in profiles.items()}
    lines = []
    for index, (label, digits, _) in enumerate(next(iter(columns.values()))):
        values = {title: column[index][2] for title, column in columns.items()}
        ratios = {title: _ratio(values[title], values[other]) for title, other in teachers.items()}
        if label == _TIME:
            ratios = {
                title: time_ratio(profiles[title].milliseconds, profiles[other].milliseconds)
                for title, other in teachers.items()
            }
        if any(value is not None for value in values.values()):
            lines.append(
                [label, *(_cell(values[title], ratios.get(title), digits) for title in profiles)]
            )
    align = ["left", *["right"] * len(profiles)]
    return tabulate(lines, headers=["", *profiles], disable_numparse=True, colalign=align)


def plain(profiles: Mapping[str, Profile], teachers: Mapping[str, str]) -> dict[str, Any]:
    """By title: all that was measured, the median time, and the teacher's title."""
    return {
        title: {
            **asdict(each),
            "milliseconds_per_image": each.milliseconds_per_image,
            "teacher": teachers.get(title, ""),
        }
        for title, each in profiles.items()
    }


def _column(profile: Profile) -> list[tuple[str, int, float | None]]:
    """Label, digits and value of each row; None: not known."""
    median = profile.milliseconds_per_image
    flops: Mapping[str, float | None] = profile.gflops or dict.fromkeys(PARTS)
    return [
        ("parameters, million", 3, sum(profile.parameters.values()) / 1e6),
        *((f"- {part}", 3, profile.parameters[part] / 1e6) for part in PARTS),
        ("multiply-adds, 10^9", 3, sum(profile.gflops.values()) if profile.gflops else None),
        *((f"- {part}", 3, flops[part]) for part in PARTS),
        ("weights, MB on disk", 2, profile.megabytes),
        ("peak memory, MB", 0, profile.peak_megabytes),
        (_TIME, 1, median),
        *((f"- {part}", 1, profile.shares[part] * median) for part in (*PARTS, REST)),
        ("images per second", 1, 1000 / median),
        (f"{_TIME}, onnxruntime", 1, _median(profile.onnx_milliseconds)),
    ]


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _ratio(value: float | None, other: float | None) -> float | None:
    return None if value is None or not other else value / other


def _cell(value: float | None, ratio: float | None, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + ("" if ratio is None else f" ({ratio:.2f})")
