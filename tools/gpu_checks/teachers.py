"""The teacher as it is prepared for its passes against the one that detectron2 built."""

from __future__ import annotations

import copy
from functools import partial

import torch

from distill_d2 import Teacher
from distill_d2.taps import map_tensors
from distill_d2.testing import Family, families

from .report import Report, use_exact_float32

# Largest error relative to the largest value of a level.
TOLERANCES = {"": 1e-4, "bfloat16": 0.1, "float16": 0.02}


def check_teachers(report: Report, device: str) -> None:
    for name, family in families().items():
        for autocast, tolerance in TOLERANCES.items():
            if device == "cpu" and autocast:
                continue  # a CPU may only emulate it
            check = partial(prepared_equals_plain, family, device, autocast, tolerance)
            report.run("prepared teacher", f"{name}, {autocast or 'float32'}", check)


def prepared_equals_plain(family: Family, device: str, autocast: str, tolerance: float) -> str:
    """Compare the levels of both on images of a batch; returns the largest relative error.

    Raises:
        AssertionError: it is above ``tolerance``.
    """
    torch.manual_seed(0)
    use_exact_float32()
    model = family.build(16).to(device)
    plain = Teacher(copy.deepcopy(model), prepare=False)
    prepared = Teacher(model, prepare=True, autocast=autocast)
    images = [item["image"].to(device) for item in family.batch()]
    height, width = (max(image.shape[side] for image in images) for side in (1, 2))
    multiple = max(plain.padding[0], 1)
    size = (-(-height // multiple) * multiple, -(-width // multiple) * multiple)
    levels = [neck_of(teacher, images, size) for teacher in (plain, prepared)]
    errors = [
        float((a - b).abs().max() / a.abs().max()) for a, b in zip(*(each.values() for each in levels))
    ]
    if not max(errors) <= tolerance:  # NaN, too
        raise AssertionError(f"relative errors {errors} of {list(levels[0])}, expected {tolerance:g}")
    return f"relative error {max(errors):.1e}"


def neck_of(
    teacher: Teacher, images: list[torch.Tensor], size: tuple[int, int]
) -> dict[str, torch.Tensor]:
    view = teacher.view
    for name in view.neck_shapes:
        view.require_level(name)
    with view.recording():
        teacher.observe(images, size)
        return map_tensors(torch.clone, {name: view.level(name) for name in view.neck_shapes})
