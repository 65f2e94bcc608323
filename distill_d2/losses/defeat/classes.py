"""DeFeat's terms on the classes of the heads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Dict

import torch

from ...views import Batch, Predictions
from ..heads import object_rows
from ..rows import class_mean, divergence

ROWS = ("decouple", "all", "correct", "cfore")


def class_terms(
    student: Predictions, teacher: Predictions, batch: Batch, s: SimpleNamespace
) -> Dict[str, torch.Tensor]:
    """The divergence of the student's classes from the teacher's on common rows, weighted.

    Args:
        s: DeFeat's settings.

    Returns:
        "hcls" of objects and "hcls_back" of the background, where their weights are not 0; or "hcls" of
        the rows that HEAD_CLS_ROWS chooses. A term without rows is 0.
    """
    objects, background = object_rows(student, batch)
    parts = {"hcls": (objects, s.head_cls_w, s.head_cls_t)}
    if s.head_cls_rows == "decouple":
        parts["hcls_back"] = (background, s.head_cls_back_w, s.head_cls_back_t)
    else:
        rows = objects if s.head_cls_rows == "cfore" else objects | background
        if s.head_cls_rows != "all":
            rows = rows & (teacher.logits.argmax(dim=-1) == student.classes)
        parts["hcls"] = (rows, s.head_cls_w, s.head_cls_t)
    terms = {}
    for name, (rows, weight, temperature) in parts.items():
        if weight > 0:
            loss = divergence(student.background, temperature)
            few = rows is objects
            terms[name] = weight * class_mean(loss, student, teacher, rows, few=few)
    return terms
