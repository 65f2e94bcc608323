"""DeFeat as its formulas read: what the loss is compared to.

Boxes are looped over, masks multiply whole maps, objects and background each square the difference
anew, and rows are picked by their labels, as in its authors' code.
"""

from __future__ import annotations

import math
import sys
from typing import Any, Callable

import torch
import torch.nn.functional as F

Tensors = list[torch.Tensor]

# What the formula below can do, where the loss can do more.
MODES = {
    "mask": "gt",
    "level_assign": "single",
    "loss_form": "L2",
    "head_cls_rows": "decouple",
    "proposals": "student",
    "decay": "none",
}


def plain_defeat(loss: Any) -> tuple[Callable, Tensors]:
    """The terms of a DeFeat ``loss`` as a function of (student, teacher, batch), and the parameters,
    shared with the loss, that it trains.

    Raises:
        SystemExit: the formula lacks what the loss is set to.
    """
    s = loss.settings
    for name, expected in MODES.items():
        if getattr(s, name) != expected:
            sys.exit(
                f"benchmark: --against-naive: MODEL.DISTILLER.DEFEAT.{name.upper()} is "
                f"{getattr(s, name)!r}, expected {expected!r}"
            )
    if loss.backbone is not None:
        sys.exit(
            "benchmark: --against-naive: the plain formula of DeFeat has no backbone terms; set "
            "MODEL.DISTILLER.DEFEAT.HINT_BB_W and HINT_BB_BACK_W to 0.0"
        )

    def compute(student, teacher, batch) -> dict[str, torch.Tensor]:
        terms = {}
        if loss.neck is not None:
            boxes = [item["instances"].gt_boxes.tensor for item in batch.inputs]
            terms["neck"] = neck_term(loss, loss.neck(student, teacher), boxes)
        if loss.compares_heads:
            terms["classes"] = class_term(loss, student, teacher, batch)
        return terms

    return compute, list(loss.parameters())


def neck_term(loss: Any, pairs: dict[str, tuple[torch.Tensor, ...]], boxes: Tensors) -> torch.Tensor:
    s, strides = loss.settings, loss.neck.strides
    total = 0.0
    for index, (name, (ours, theirs)) in enumerate(sorted(pairs.items(), key=lambda p: strides[p[0]])):
        mask = draw(boxes, index, len(pairs), theirs, strides[name], s.finest_scale)
        channels = theirs.shape[1]
        for region, weight in ((mask, s.hint_neck_w), (1 - mask, s.hint_neck_back_w)):
            count = torch.clamp(2 * channels * region.sum(), min=1)
            total = total + weight * (region * (ours - theirs) ** 2).sum() / count
    return total / len(pairs)


def draw(
    boxes: Tensors, index: int, levels: int, like: torch.Tensor, stride: int, finest_scale: float
) -> torch.Tensor:
    """The mask (N, 1, H, W) of the boxes of a level."""
    mask = like.new_zeros(len(like), 1, *like.shape[-2:])
    height, width = like.shape[-2:]
    for image, per_image in enumerate(boxes):
        for x1, y1, x2, y2 in per_image.tolist():
            scale = math.sqrt((x2 - x1 + 1) * (y2 - y1 + 1))
            level = math.floor(math.log2(scale / finest_scale + 1e-6))
            if min(max(level, 0), levels - 1) != index:
                continue
            left, top = max(int(x1 / stride), 0), max(int(y1 / stride), 0)
            right, bottom = min(int(x2 / stride), width), min(int(y2 / stride), height)
            if left == right or top == bottom:
                mask[image, 0, top : top + 1, left : left + 1] = 1
            else:
                mask[image, 0, top:bottom, left:right] = 1
    return mask


def class_term(loss: Any, student: Any, teacher: Any, batch: Any) -> torch.Tensor:
    s = loss.settings
    if loss.capability == "dense":
        ours, theirs = student.dense(), teacher.dense()
        labels = ours.match(batch.truth.boxes, batch.truth.valid)
        objects, background = labels == 1, labels == 0
    else:
        ours, theirs = student.box_head(), teacher.box_head(student.sampled_proposals())
        objects = (ours.classes < ours.num_classes) & ours.valid
        background = ~objects & ours.valid
    divergence = softmax_divergence if ours.background else sigmoid_divergence
    logits = ours.logits, theirs.logits
    total = 0.0
    for rows, weight, temperature in (
        (objects, s.head_cls_w, s.head_cls_t),
        (background, s.head_cls_back_w, s.head_cls_back_t),
    ):
        if weight > 0 and rows.any():
            picked = (part[rows] / temperature for part in logits)
            total = total + weight * temperature**2 * divergence(*picked)
    return total


def softmax_divergence(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    return F.kl_div(ours.log_softmax(dim=1), theirs.softmax(dim=1), reduction="batchmean")


def sigmoid_divergence(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    p, q = ours.sigmoid(), theirs.sigmoid()
    each = q * (q.log() - p.log()) + (1 - q) * ((1 - q).log() - (1 - p).log())
    return each.sum(dim=1).mean()
