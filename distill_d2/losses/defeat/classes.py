"""DeFeat's terms on the classes of the heads."""

from __future__ import annotations

import torch

from ...views import Batch, Predictions
from ..heads import object_rows
from ..rows import class_mean, divergence
from .settings import DeFeatSettings


def class_terms(
    student: Predictions, teacher: Predictions, batch: Batch, s: DeFeatSettings
) -> dict[str, torch.Tensor]:
    """The divergence of the student's classes from the teacher's on common rows, weighted.

    Args:
        s: DeFeat's settings.

    Returns:
        "hcls" of objects and "hcls_back" of the background, where their weights are not 0; or "hcls" of
        the rows that HEAD_CLS_ROWS chooses. A term without rows is 0.
    """
    rows, background = object_rows(student, batch)  # objects
    decoupled = s.head_cls_rows == "decouple"
    if s.head_cls_rows in ("all", "correct"):
        rows = rows | background
    if s.head_cls_rows in ("correct", "cfore"):
        rows = rows & (teacher.logits.argmax(dim=-1) == student.classes)
    terms = {}
    if s.head_cls_w > 0:
        loss = divergence(student.background, s.head_cls_t)
        term = class_mean(loss, student, teacher, rows, sparse=decoupled)
        terms["hcls"] = s.head_cls_w * term
    if decoupled and s.head_cls_back_w > 0:
        loss = divergence(student.background, s.head_cls_back_t)
        term = class_mean(loss, student, teacher, background, sparse=False)
        terms["hcls_back"] = s.head_cls_back_w * term
    return terms
