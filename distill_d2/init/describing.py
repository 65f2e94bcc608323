"""What was found and chosen, and the next commands, in words."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .boxes import Boxes, side
from .trial import Trial
from .writing import EVALUATIONS, FILES, Plan

_MOST_CLASSES = 20


def describe(
    plan: Plan,
    boxes: Boxes,
    datasets: Mapping[str, Sequence[Any]],
    trial: Trial | None,
    remarks: Sequence[str],
    output: str,
) -> str:
    """The summary that a user reads.

    Args:
        boxes: of training.
        datasets: records by name.
        trial: of the plan's detectors; None: they were not tried.
        remarks: on the choices.
        output: the folder, as the user named it.
    """
    lines = [*_data(plan, boxes, datasets), *(f"note: {remark}" for remark in remarks), ""]
    lines += [*_choices(plan, trial), "", f"Written to {output}: {', '.join(FILES)}.", ""]
    return "\n".join([*lines, *_commands(plan, _durations(plan, datasets, trial), output)])


def _data(plan: Plan, boxes: Boxes, datasets: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    width = max(map(len, datasets))
    for name, records in datasets.items():
        objects = sum(len(record["annotations"]) for record in records)
        kind = next(entry["FORMAT"] for entry in plan.entries if entry["NAME"] == name)
        yield f"{name:{width}}  {kind}  {len(records)} images, {objects} objects"
    counts = [f"{name} {boxes.classes[number]}" for number, name in enumerate(plan.classes)]
    more = f", and {len(counts) - _MOST_CLASSES} more" if len(counts) > _MOST_CLASSES else ""
    yield f"classes, with their objects in training: {', '.join(counts[:_MOST_CLASSES])}{more}"
    low, high = boxes.images.min(axis=0), boxes.images.max(axis=0)
    yield f"images: {_span(low[0], high[0])} x {_span(low[1], high[1])} pixels"
    sides = np.quantile(side(boxes.corners), (0.05, 0.5, 0.95))
    resized = np.quantile(side(boxes.resized(plan.short, plan.long)), (0.05, 0.5, 0.95))
    yield (
        f"objects (square roots of areas, 5 %, median and 95 %): {_numbers(sides)} pixels, resized to "
        f"{plan.short} x {plan.long}: {_numbers(resized)}"
    )


def _choices(plan: Plan, trial: Trial | None) -> Iterator[str]:
    anchors = plan.anchors
    yield f"detectors: {plan.pair.summary}"
    if trial:
        yield (
            f"  here the student takes {1000 * trial.student_image:.0f} ms per image and the teacher "
            f"{1000 * trial.teacher_image:.0f}, {trial.teacher_image / trial.student_image:.1f} times as long"
        )
    else:
        yield "  they are made for a GPU, so times were not measured here"
    yield (
        f"anchors: {anchors.sizes[0][0]:g} to {anchors.sizes[-1][-1]:g} pixels, heights by widths "
        f"{', '.join(f'{ratio:g}' for ratio in anchors.ratios)}; {100 * anchors.recall:.1f} % of the objects have "
        "one with an IoU of 0.5"
    )
    yield f"schedule: {plan.epochs:g} epochs of {plan.pair.batch} images per step; loss: PKD, weight {plan.pkd:g}"


def _commands(plan: Plan, durations: Sequence[str], output: str) -> Iterator[str]:
    gpus = "" if plan.gpu else " --num-gpus 0"
    names = (("baseline", "teacher"), ("train", "distill"), ("baseline", "student"))
    teacher, distilled, student = (
        f"  distill-d2 {command}{gpus} --config-file {_word(output, f'{name}.yaml')}{duration}"
        for (command, name), duration in zip(names, durations)
    )
    report = f"  distill-d2 report {_word(output, 'teacher')} {_word(output, 'distilled')}"
    yield from ("Next:", teacher, distilled, f"{report} --output {_word(output, 'report.html')}")
    yield from (
        "The student alone, to compare with, before the report, which takes its folder too:",
        student,
    )


def _durations(plan: Plan, datasets: Mapping[str, Sequence[Any]], trial: Trial | None) -> Sequence[str]:
    """Comments on the commands: how long teacher, distillation and student alone take."""
    if trial is None:
        return ("", "", "")
    trained_on = sum(bool(record["annotations"]) for name in plan.train for record in datasets[name])
    evaluated = EVALUATIONS * sum(len(datasets[name]) for name in plan.test)
    steps = plan.epochs * trained_on / plan.pair.batch
    reading = trial.data * (steps * plan.pair.batch + evaluated)
    times = (
        steps * trial.teacher_step + evaluated * trial.teacher_image,
        steps * trial.distilled_step + evaluated * trial.student_image,
        steps * trial.student_step + evaluated * trial.student_image,
    )
    return [f"  # {_duration(reading + seconds)}" for seconds in times]


def _word(*path: str) -> str:
    return shlex.quote(os.path.join(*path))


def _span(low: float, high: float) -> str:
    return f"{low:.0f}" if low == high else f"{low:.0f}-{high:.0f}"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.0f}" for value in values)


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 1.5:
        return "about a minute"
    return f"about {minutes:.0f} minutes" if minutes < 100 else f"about {minutes / 60:.1f} hours"
