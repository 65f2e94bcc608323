"""Fixtures of AT, of mmrazor's loss."""

from __future__ import annotations

from distill_d2.losses.at import AT, normalized_attention

from . import Fixture
from .neck import cases_of, compare_map, maps_of, neck_kind, run_case


@neck_kind()
def at(fixture: Fixture) -> None:
    for case in cases_of(fixture, "at"):
        run_case(fixture, f"at/{case}", AT(weight=1.0), {})
    for level, teacher in maps_of(fixture, "teacher").items():
        compare_map(fixture, f"at/attention_teacher/{level}", normalized_attention(teacher))
