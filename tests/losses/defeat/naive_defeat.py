"""DeFeat and FGFI by loops over levels, images and rows, in float64; nothing of the package.

Maps are (N, C, H, W) by level name, float64; rows are logits (K,), those of a box head with the
background last. Losses are differentiable in the student's maps and logits, and in the adapters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import naive_masks as masks
import torch
import torch.nn.functional as F
from torch import Tensor

Maps = dict[str, Tensor]
Adapters = dict[str, tuple[Tensor, Tensor]]  # weight and bias by level


class Row(NamedTuple):
    """One row of both heads.

    Attributes:
        kind: "object", "background" or "ignored".
        label: its class, where it is known.
    """

    student: Tensor
    teacher: Tensor
    kind: str
    label: int | None = None


def adapted(level: Tensor, adapter: tuple[Tensor, Tensor] | None, relu: bool, size) -> Tensor:
    if adapter is not None:
        weight, bias = adapter
        level = F.conv2d(level, weight, bias, padding=weight.shape[-1] // 2)
        level = level.clamp(min=0) if relu else level
    if level.shape[-2:] != size:
        level = F.interpolate(level, size, mode="bilinear", align_corners=False)
    return level


def distance(difference: Tensor, form: str, inverted: bool = False) -> Tensor:
    size = difference.abs()
    if form == "L2":
        return difference**2
    if form == "L1":
        return size
    if inverted:
        return torch.where(size < 1, size, difference**2)
    return torch.where(size < 1, difference**2 / 2, size - 0.5)


def region_losses(
    student: Maps,
    teacher: Maps,
    level_masks: Maps,
    adapters: Adapters,
    *,
    relu: bool = False,
    form: str = "L2",
    inverted: bool = False,
) -> tuple[Tensor, Tensor]:
    """Of objects and of the background, the mean over levels of half the mean distance."""
    totals = [0.0, 0.0]
    for name, mask in level_masks.items():
        ours = adapted(student[name], adapters.get(name), relu, teacher[name].shape[-2:])
        sums, counts = [0.0, 0.0], [0.0, 0.0]
        for image in range(len(ours)):
            gaps = distance(ours[image] - teacher[name][image], form, inverted)
            for region, of_image in enumerate((mask[image], 1 - mask[image])):
                sums[region] = sums[region] + (of_image * gaps).sum()
                counts[region] += float(of_image.sum())
        for region in (0, 1):
            totals[region] = totals[region] + sums[region] / max(1, 2 * len(gaps) * counts[region])
    return totals[0] / len(level_masks), totals[1] / len(level_masks)


def log_sigmoid(logit: Tensor) -> Tensor:
    return -torch.logaddexp(-logit, torch.zeros_like(logit))


def divergence(student: Tensor, teacher: Tensor, temperature: float, background: bool) -> Tensor:
    """KL(teacher || student) of one row, times T^2."""
    s, t = student / temperature, teacher / temperature
    if background:
        parts = [(s - torch.logsumexp(s, 0), t - torch.logsumexp(t, 0))]
    else:
        parts = [(log_sigmoid(sign * s), log_sigmoid(sign * t)) for sign in (1, -1)]
    return temperature**2 * sum((q.exp() * (q - p)).sum() for p, q in parts)


def chosen(row: Row, rows: str) -> bool:
    """Whether a row counts for the one term of "all", "correct" or "cfore"."""
    if row.kind == "ignored" or rows == "all":
        return row.kind != "ignored"
    correct = int(row.teacher.argmax()) == row.label
    return correct and (rows == "correct" or row.kind == "object")


def class_losses(rows: Sequence[Row], background: bool, s) -> dict[str, Tensor]:
    """The weighted terms of one source of rows, of all images together."""
    parts = {
        "hcls": ([r for r in rows if r.kind == "object"], s.head_cls_w, s.head_cls_t),
        "hcls_back": (
            [r for r in rows if r.kind == "background"],
            s.head_cls_back_w,
            s.head_cls_back_t,
        ),
    }
    if s.head_cls_rows != "decouple":
        mine = [row for row in rows if chosen(row, s.head_cls_rows)]
        parts = {"hcls": (mine, s.head_cls_w, s.head_cls_t)}
    terms = {}
    for name, (mine, weight, temperature) in parts.items():
        total = sum(divergence(r.student, r.teacher, temperature, background) for r in mine)
        if weight > 0:
            terms[name] = weight * torch.as_tensor(total / max(1, len(mine)), dtype=torch.float64)
    return terms


def decay(kind: str, iteration: int, max_iter: int) -> float:
    done = iteration / max_iter
    if kind == "linear":
        return 1 - done
    if kind == "cos":
        return 0.5 * math.cos(math.pi * done) + 0.5
    if kind == "up-down":
        quarter = max_iter / 4
        if iteration <= quarter:
            return 1 + iteration / quarter
        return 2 - 2 * (iteration - quarter) / (max_iter - quarter)
    return 1.0


class Step(NamedTuple):
    """What both detectors computed on a batch.

    Attributes:
        student, teacher: maps of the neck and of backbone stages.
        strides: of the neck's levels that are compared; stages: the names of those compared.
        anchors: (H, W, A, 4) by level.
        truth: per image, a list of boxes; padded: (H, W) of the images.
        adapters: of the levels and stages that have one.
        rows: by source of proposals, of all images; background: their probabilities are a softmax.
    """

    student: Maps
    teacher: Maps
    strides: dict[str, int]
    stages: Sequence[str]
    anchors: dict[str, Tensor]
    truth: list[list[masks.Box]]
    padded: masks.Size
    adapters: Adapters
    rows: dict[str, list[Row]]
    background: bool = True
    iteration: int = 0
    max_iter: int = 1

    def level_masks(self, kind: str, s) -> Maps:
        sizes = {name: tuple(self.teacher[name].shape[-2:]) for name in self.strides}
        return masks.object_masks(
            kind,
            self.truth,
            sizes,
            self.strides,
            self.anchors,
            level_assign=s.level_assign,
            finest_scale=s.finest_scale,
            threshold=s.roi_phi,
        )

    def stage_masks(self) -> Maps:
        mask = masks.stage_mask(self.truth, self.padded)
        return {name: masks.picked(mask, self.teacher[name].shape[-2:]) for name in self.stages}


def defeat(step: Step, s) -> dict[str, Tensor]:
    """All terms that have a weight, of DeFeat's settings."""
    terms = {}
    both = step.student, step.teacher
    options = {"form": s.loss_form, "inverted": s.reference_bugs}
    if s.hint_neck_w or s.hint_neck_back_w:
        found = region_losses(*both, step.level_masks(s.mask, s), step.adapters, **options)
        terms["neck"], terms["neck_back"] = s.hint_neck_w * found[0], s.hint_neck_back_w * found[1]
    if s.hint_bb_w or s.hint_bb_back_w:
        found = region_losses(*both, step.stage_masks(), step.adapters, relu=True, **options)
        terms["bb"], terms["bb_back"] = s.hint_bb_w * found[0], s.hint_bb_back_w * found[1]
    sources = ("student", "teacher") if s.proposals == "both" else (s.proposals,)
    for source in sources if s.head_cls_w or s.head_cls_back_w else ():
        for name, term in class_losses(step.rows[source], step.background, s).items():
            terms[name + ("_teacher" if source != sources[0] else "")] = term
    weights = {"neck": s.hint_neck_w, "neck_back": s.hint_neck_back_w}
    weights.update(bb=s.hint_bb_w, bb_back=s.hint_bb_back_w)
    factor = decay(s.decay, step.iteration, step.max_iter)
    return {
        f"loss_defeat_{name}": factor * term for name, term in terms.items() if weights.get(name, 1) > 0
    }


def fgfi(step: Step, s) -> dict[str, Tensor]:
    """FGFI's term, without its weight."""
    level_masks = step.level_masks("roi", s)
    near, _ = region_losses(step.student, step.teacher, level_masks, step.adapters, relu=s.adapter_relu)
    return {"loss_fgfi": near}
