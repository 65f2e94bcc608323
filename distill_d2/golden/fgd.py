"""Fixtures of FGD, of the authors' code; "fgd/ref" is it as it is, the rest has masks with boxes by stride."""

from __future__ import annotations

from typing import Any

from distill_d2.losses.attention import attentions
from distill_d2.losses.fgd import FGD

from . import Fixture
from .neck import CaseRun, cases_of, compare_map, neck_kind, run_case

_PARAMETERS = {
    "pairs.adapters.{}": "align",
    "of_student.{}.mask": "conv_mask_s",
    "of_teacher.{}.mask": "conv_mask_t",
    "of_student.{}.add": "channel_add_conv_s",
    "of_teacher.{}.add": "channel_add_conv_t",
}


@neck_kind(inputs="fgd/weights fgd/temperature")
def fgd(fixture: Fixture) -> None:
    for case in cases_of(fixture, "fgd"):
        run = run_case(fixture, f"fgd/{case}", _loss(fixture), _PARAMETERS)
        if case == "equal":
            _compare_parts(fixture, run)
    _compare_reference(fixture)


def _loss(fixture: Fixture, **keys: Any) -> FGD:
    names = ("fg_weight", "bg_weight", "at_weight", "global_weight")
    weights = dict(zip(names, map(float, fixture["fgd/weights"])))
    return FGD(temperature=float(fixture["fgd/temperature"]), **weights, **keys)


def _compare_parts(fixture: Fixture, run: CaseRun) -> None:
    loss: Any = run.loss
    for level, (s, t) in loss.pairs(run.student, run.teacher).items():
        masks = loss.masks(run.batch, level, tuple(t.shape[-2:]))
        for name, mask in zip(("mask_fg", "mask_bg"), masks):
            fixture.compare(f"fgd/{name}/{level}", mask, rtol=1e-6)
        for role, feature in (("student", s), ("teacher", t)):
            for name, values in zip(
                ("spatial", "channel"), attentions(feature, loss.settings.temperature)
            ):
                compare_map(fixture, f"fgd/{name}_{role}/{level}", values)


def _compare_reference(fixture: Fixture) -> None:
    run = run_case(
        fixture, "fgd/ref", _loss(fixture, reference_bugs=True), _PARAMETERS, values_of="fgd/equal"
    )
    loss: Any = run.loss
    for level, (_, t) in loss.pairs(run.student, run.teacher).items():
        mask, _ = loss.masks(run.batch, level, tuple(t.shape[-2:]))
        fixture.compare(f"fgd/ref/mask_fg/{level}", mask, rtol=1e-6)
