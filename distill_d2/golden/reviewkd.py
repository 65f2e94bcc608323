"""Fixtures of ReviewKD, of the authors' detectron2 code."""

from __future__ import annotations

from typing import Any

from distill_d2.losses.review_kd import ReviewKD

from . import Fixture
from .neck import cases_of, compare_map, neck_kind, run_case

_PARAMETERS = {
    "fusions.{}.first": "conv1",
    "fusions.{}.attention": "att_conv.0",
    "fusions.{}.last": "conv2",
}


@neck_kind()
def reviewkd(fixture: Fixture) -> None:
    for case in cases_of(fixture, "reviewkd"):
        weights = fixture.names(f"reviewkd/{case}/param/*/conv1.0.weight")
        loss: Any = ReviewKD(channels=len(fixture[weights[0]]))
        run = run_case(fixture, f"reviewkd/{case}", loss, _PARAMETERS)
        for level, (made, _) in loss.made(run.student, run.teacher).items():
            compare_map(fixture, f"reviewkd/{case}/out/{level}", made)
