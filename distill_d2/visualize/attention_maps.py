"""Where on each level two detectors look."""

from __future__ import annotations

import torch

from distill_d2.views import Batch

from . import ColorScale, Picture, Row

Both = dict[str, tuple[torch.Tensor, torch.Tensor]]


def attention_rows(maps: Both, batch: Batch, picture: Picture) -> list[Row]:
    """A row of the student's attention and one of the teacher's, on one color scale.

    Args:
        maps: the student's and the teacher's attention (h, w) by level.
    """
    padded = batch.padded_size
    top = max(float(picture.visible(values, padded).max()) for both in maps.values() for values in both)
    scale = ColorScale("attention, 1 where it is even", top or 1.0)
    rows = []
    for index, role in enumerate(("student", "teacher")):
        panels = [picture.ground_truth(f"ground truth, {role}")]
        for name, both in maps.items():
            largest = float(picture.visible(both[index], padded).max())
            panels.append(picture.heat(f"{name}, {role}: at most {largest:.3g}", both[index], padded))
        rows.append(Row(panels, scale))
    return rows
