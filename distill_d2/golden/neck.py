"""What the fixtures of the losses on necks share: one layout, and one check of it.

Inputs "student/<level>", "teacher/<level>", (N, C, H, W) of equal shapes, "narrow/<level>" of a student with
other channels, "stride/<level>", and "padded_size"; where the loss reads the ground truth, "image_sizes" (N, 2),
"boxes" (G, 4) and "box_image" (G,). A case "<name>/<case>/" has parameters "param/<level>/<name>" and results:
"loss/<level>[/<term>]", unweighted; "total" and "total_f64"; gradients of the total "grad/student/<level>" and
"grad/param/<level>/<name>", and of a term's sum over levels "grad_<term>/student/<level>".

The kind of a loss is a file that says how to build the loss, and how its parameters are called in the fixture:

    @neck_kind(inputs="my_loss/weight")
    def my_loss(fixture: Fixture) -> None:
        for case in cases_of(fixture, "my_loss"):
            loss = MyLoss(weight=float(fixture["my_loss/weight"]))
            run = run_case(fixture, f"my_loss/{case}", loss, {"pairs.adapters.{}": "align", "blocks.{}": ""})
            fixture.compare(...)  # what else the file has
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Callable

import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from distill_d2.losses.neck import LevelTerms, NeckLoss
from distill_d2.testing.maps import GivenView, Maps, view_of
from distill_d2.views import Batch, Predictions

from . import Fixture, FixtureError, golden_kind

#: Patterns of the arrays that nothing is compared with, by kind.
INPUTS: dict[str, str] = {}
_COMMON_INPUTS = (
    "student/* teacher/* narrow/* stride/* padded_size image_sizes boxes box_image "
    "*[!d]/param/* *[!a]d/param/*"  # not those of a folder "grad"
)
#: Patterns of inputs whose first dimension is that of images, beside the maps.
PER_IMAGE = "teacher_logits/* student_logits/* */uniform/* */kept/* */cotangent/*"
#: Of a map's largest value.
MAP_TOLERANCE = 5e-6
_ZERO = 1e-10


def neck_kind(*, inputs: str = "") -> Callable:
    """Decorator: a kind of fixture, by the name of the function, of this layout.

    Args:
        inputs: patterns of further arrays that are inputs, separated by spaces.
    """

    def register(check: Callable[[Fixture], None]) -> Callable[[Fixture], None]:
        name = check.__name__
        INPUTS[name] = f"{_COMMON_INPUTS} {inputs}"
        holds = ["student/*", "teacher/*", f"{name}/*/total"]
        return golden_kind(holds=holds, rtol=1e-5, atol=0.0)(check)

    return register


def cases_of(fixture: Fixture, name: str) -> list[str]:
    """The cases of a file that have gradients; "ref", of the reference as it is, has none."""
    totals = [array.split("/")[1] for array in fixture.names(f"{name}/*/total")]
    return [case for case in totals if fixture.names(f"{name}/{case}/grad/*")]


@dataclass(frozen=True)
class CaseRun:
    """A loss as it ran on the inputs of a case.

    Attributes:
        loss: bound to the views, with the case's parameters.
        maps: the student's by level name; their gradients are those of the total.
        terms: ``level_terms``.
    """

    loss: NeckLoss
    student: GivenView
    teacher: GivenView
    batch: Batch
    maps: Maps
    terms: LevelTerms


def run_case(
    fixture: Fixture,
    folder: str,
    loss: NeckLoss,
    parameters: Mapping[str, str],
    *,
    values_of: str = "",
    predictions: tuple[Predictions, Predictions] | tuple[None, None] = (None, None),
    iteration: int = 0,
    parameter_tolerance: float = 1e-5,
) -> CaseRun:
    """Run a loss as in a training step, and compare all results of a case that the file has.

    Args:
        folder: "<name>/<case>"; a case with "narrow" in its name has the maps "narrow/".
        loss: with the case's settings, unbound.
        parameters: what the names of the loss's parameters begin with, with {} for the level, and what the
            fixture's names have in its place.
        values_of: the folder of the parameters; "": ``folder``.
        predictions: of both heads.
        parameter_tolerance: of gradients, times the largest value of each.
    """
    run = _run(fixture, folder, loss, predictions, iteration)
    maps = run.maps
    own = _named(loss, list(maps), parameters)
    _load(fixture, values_of or folder, own)
    run.terms.update(loss.level_terms(run.student, run.teacher, run.batch))
    for level, values in run.terms.items():
        for term, value in values.items():
            name = "/".join(filter(None, (folder, "loss", level, term)))
            if name in fixture.arrays:
                fixture.compare(name, value)
    _compare_gradients_of_terms(fixture, folder, run)
    terms = loss(run.student, run.teacher, run.batch).values()
    total = torch.stack(list(terms)).sum() * loss.factor(iteration)
    for name in ("total", "total_f64"):
        fixture.compare(f"{folder}/{name}", total)
    if fixture.names(f"{folder}/grad/*"):
        total.backward()
        for level, values in maps.items():
            compare_map(fixture, f"{folder}/grad/student/{level}", values.grad)
        for name, parameter in own.items():
            array = f"{folder}/grad/param/{name}"
            if array in fixture.arrays:
                compare_map(fixture, array, parameter.grad, parameter_tolerance)
    return run


def _run(
    fixture: Fixture,
    folder: str,
    loss: NeckLoss,
    predictions: tuple[Predictions, Predictions] | tuple[None, None],
    iteration: int,
) -> CaseRun:
    """The loss, bound; without terms."""
    maps = maps_of(fixture, "narrow" if "narrow" in folder.split("/")[1] else "student")
    maps = {name: values.requires_grad_() for name, values in maps.items()}
    strides = {name: int(fixture[f"stride/{name}"]) for name in maps}
    student = view_of(maps, "student", strides, predictions[0])
    teacher = view_of(maps_of(fixture, "teacher"), "teacher", strides, predictions[1])
    loss.bind(student, teacher)
    images = len(next(iter(maps.values())))
    return CaseRun(loss, student, teacher, batch_of(fixture, images, iteration), maps, {})


def compare_map(
    fixture: Fixture, name: str, actual: torch.Tensor | None, tolerance: float = MAP_TOLERANCE
) -> None:
    """Compare with a tolerance that is a fraction of the array's largest value; zeros may be rounding errors."""
    expected = fixture[name]
    actual = torch.zeros(expected.shape) if actual is None else actual
    if actual.numel() == expected.size:  # the fixture's linear layers are 1x1 convolutions
        actual = actual.detach().reshape(expected.shape)
    largest = float(np.abs(expected).max(initial=0.0))
    fixture.compare(name, actual, rtol=0.0, atol=tolerance * largest or _ZERO)


def maps_of(fixture: Fixture, folder: str) -> Maps:
    """The arrays "folder/level" by level name."""
    return {name.rpartition("/")[2]: fixture.tensor(name) for name in fixture.names(f"{folder}/*")}


def batch_of(fixture: Fixture, images: int, iteration: int = 0) -> Batch:
    """The batch of a file; images without ground truth where it has none."""
    height, width = (int(side) for side in fixture["padded_size"])
    sizes = [(height, width)] * images
    if "image_sizes" in fixture.arrays:
        sizes = [(int(h), int(w)) for h, w in fixture["image_sizes"]]
    boxes, image_of = torch.zeros(0, 4), torch.zeros(0)
    if "boxes" in fixture.arrays:
        boxes, image_of = fixture.tensor("boxes"), fixture.tensor("box_image")
    inputs = []
    for index, size in enumerate(sizes):
        own = boxes[image_of == index]
        instances = Instances(
            size, gt_boxes=Boxes(own), gt_classes=torch.zeros(len(own), dtype=torch.long)
        )
        inputs.append({"image": torch.zeros(3, *size), "instances": instances})
    return Batch(inputs, (height, width), iteration, iteration + 1)


def _named(loss: NeckLoss, levels: list[str], prefixes: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """A loss's parameters by "<level>/<name in the fixture>"."""
    named = {}
    for own, parameter in loss.named_parameters():
        names = [
            "/".join((level, ".".join(filter(None, (theirs, own[len(start) + 1 :])))))
            for level in levels
            for prefix, theirs in prefixes.items()
            if own.startswith((start := prefix.format(level)) + ".") or own == start
        ]
        if len(names) != 1:
            raise FixtureError(f"has {len(names)} names, {names}, of the parameter {own}; expected one")
        named[names[0]] = parameter
    return named


@torch.no_grad()
def _load(fixture: Fixture, folder: str, own: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in own.items():
        parameter.copy_(fixture.tensor(f"{folder}/param/{name}").view_as(parameter))
    unknown = {name.partition("/param/")[2] for name in fixture.names(f"{folder}/param/*")} - own.keys()
    if unknown:
        raise FixtureError(f"has parameters in {folder} that the loss lacks: {sorted(unknown)}")


def _compare_gradients_of_terms(fixture: Fixture, folder: str, run: CaseRun) -> None:
    for term in next(iter(run.terms.values())):
        if term and fixture.names(f"{folder}/grad_{term}/student/*"):
            total = torch.stack([values[term] for values in run.terms.values()]).sum()
            gradients = torch.autograd.grad(total, list(run.maps.values()), retain_graph=True)
            for level, gradient in zip(run.maps, gradients):
                compare_map(fixture, f"{folder}/grad_{term}/student/{level}", gradient)
