"""DeFeat and FGFI as their formulas read: an oracle for the package's versions, and the other side of DeFeat's
benchmark. Nothing is shared with the package.

Boxes are looped over, masks multiply whole maps, objects and background each take the difference anew, and
rows are picked by their labels, as in the authors' code. Maps are (N, C, H, W) by level name; boxes are
absolute XYXY pixels, a tensor (M, 4) for each image.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, Callable, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor

Maps = dict[str, Tensor]
Size = tuple[int, int]
Adapters = dict[str, tuple[Tensor, Tensor]]  # weight and bias by level


# ------------------------------------------------------------------------------------- masks of objects


def level_of(box: Sequence[float], levels: int, finest_scale: float = 56.0) -> int:
    x1, y1, x2, y2 = box
    scale = math.sqrt((x2 - x1 + 1) * (y2 - y1 + 1))
    level = math.floor(math.log2(scale / finest_scale + 1e-6))
    return min(max(level, 0), levels - 1)


def cells_of(box: Sequence[float], size: Size, stride: int) -> tuple[slice, slice]:
    """Rows and columns that a box covers."""
    height, width = size
    x1, y1, x2, y2 = (int(side / stride) for side in box)
    left, top, right, bottom = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
    if left == right or top == bottom:
        top, left = min(top, height - 1), min(left, width - 1)
        return slice(top, top + 1), slice(left, left + 1)
    # A box beside the map has no cells: its last one is before the first.
    return slice(top, max(top, bottom)), slice(left, max(left, right))


def box_marks(box: Tensor, size: Size, stride: int) -> Tensor:
    marks = torch.zeros(size, dtype=torch.float64)
    marks[cells_of(box.tolist(), size, stride)] = 1
    return marks


def gaussian_marks(box: Tensor, size: Size, stride: int) -> Tensor:
    x1, y1, x2, y2 = box.tolist()
    sides = []
    for low, high, cells in ((y1, y2, size[0]), (x1, x2, size[1])):
        deviation = max((high - low) / 2, stride / 2)
        distance = (torch.arange(cells, dtype=torch.float64) + 0.5) * stride - (low + high) / 2
        sides.append((-(distance**2) / (2 * deviation**2)).exp())
    return sides[0][:, None] * sides[1] * box_marks(box, size, stride)


def anchor_marks(box: Tensor, anchors: Tensor, threshold: float) -> Tensor:
    """Of anchors (H, W, A, 4)."""
    best = pairwise_iou(Boxes(box[None]), Boxes(anchors.reshape(-1, 4))).view(anchors.shape[:3])
    best = best.amax(dim=2)
    return (best > threshold * best.max()).double()


def draw(images: Sequence[Tensor], size: Size, marks: Callable[[Tensor], Tensor]) -> Tensor:
    """(N, H, W): the largest mark of any of an image's boxes in each cell."""
    mask = torch.zeros(len(images), *size, dtype=torch.float64)
    for image, boxes in enumerate(images):
        for box in boxes:
            mask[image] = torch.maximum(mask[image], marks(box))
    return mask


def object_masks(
    kind: str,
    images: Sequence[Tensor],
    sizes: dict[str, Size],
    strides: dict[str, int],
    anchors: dict[str, Tensor] | None = None,
    *,
    level_assign: str = "single",
    finest_scale: float = 56.0,
    threshold: float = 0.5,
) -> Maps:
    """By level name, masks of kind "gt", "roi", "gaussian" or "one"."""
    masks = {}
    for index, name in enumerate(sorted(sizes, key=lambda name: strides[name])):
        size = sizes[name]
        if kind == "one":
            masks[name] = torch.ones(len(images), *size, dtype=torch.float64)
            continue
        if kind == "roi":
            marks = partial(anchor_marks, anchors=anchors[name], threshold=threshold)
        else:
            function = {"gt": box_marks, "gaussian": gaussian_marks}[kind]
            marks = partial(function, size=size, stride=strides[name])
        chosen = [
            [
                box
                for box in boxes
                if level_assign == "all" or level_of(box.tolist(), len(sizes), finest_scale) == index
            ]
            for boxes in images
        ]
        masks[name] = draw(chosen, size, marks)
    return masks


def stage_mask(images: Sequence[Tensor], padded: Size) -> Tensor:
    """All boxes on one grid of stride 4."""
    size = math.ceil(padded[0] / 4), math.ceil(padded[1] / 4)
    return draw(images, size, lambda box: box_marks(box, size, 4))


def picked(mask: Tensor, size: Size) -> Tensor:
    """Of a mask (N, H, W) the nearest cells, on a map of another size."""
    rows, columns = (
        [index * cells // wanted for index in range(wanted)]
        for cells, wanted in zip(mask.shape[1:], size)
    )
    return mask[:, rows][:, :, columns]


def square_anchors(
    sizes: dict[str, Size], strides: dict[str, int], ratios: Sequence[float] = (0.5, 1.0, 2.0)
) -> dict[str, Tensor]:
    """(H, W, A, 4) by level: anchors of 8 strides and these ratios, around cells' first corners."""
    anchors = {}
    for name, (height, width) in sizes.items():
        stride, grid = strides[name], []
        shapes = [(8 * stride / math.sqrt(ratio), 8 * stride * math.sqrt(ratio)) for ratio in ratios]
        for row in range(height):
            for column in range(width):
                x, y = column * stride, row * stride
                grid += [[x - w / 2, y - h / 2, x + w / 2, y + h / 2] for w, h in shapes]
        anchors[name] = torch.tensor(grid).view(height, width, len(ratios), 4)
    return anchors


# ------------------------------------------------------------------------------------------------ maps


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
    pairs: dict[str, tuple[Tensor, Tensor]], masks: Maps, form: str = "L2", inverted: bool = False
) -> list[Tensor]:
    """Of objects and of the background, the mean over levels of half the mean distance."""
    totals = [0.0, 0.0]
    for name, (student, teacher) in pairs.items():
        mask = masks[name][:, None].to(student)
        for index, region in enumerate((mask, 1 - mask)):
            count = torch.clamp(2 * student.shape[1] * region.sum(), min=1)
            totals[index] += (region * distance(student - teacher, form, inverted)).sum() / count
    return [total / len(pairs) for total in totals]


# --------------------------------------------------------------------------------------------- classes


class RowSet(NamedTuple):
    """Rows of both heads: logits (R, K), or (R, K + 1) with the background last.

    Attributes:
        objects, background: (R,) bool; the others are ignored.
        labels: (R,), the class of each, where it is known.
    """

    student: Tensor
    teacher: Tensor
    objects: Tensor
    background: Tensor
    labels: Tensor | None = None


def divergence(student: Tensor, teacher: Tensor, temperature: float, background: bool) -> Tensor:
    """KL(teacher || student) of rows, times T^2: their mean, 0 of none."""
    if not len(student):
        return 0 * student.sum()
    s, t = student / temperature, teacher / temperature
    if background:
        each = F.kl_div(s.log_softmax(dim=1), t.log_softmax(dim=1), log_target=True, reduction="none")
    else:
        each = sum(
            F.kl_div(F.logsigmoid(sign * s), F.logsigmoid(sign * t), log_target=True, reduction="none")
            for sign in (1, -1)
        )
    return temperature**2 * each.sum(dim=1).mean()


def class_losses(rows: RowSet, background: bool, s: Any) -> dict[str, Tensor]:
    """The weighted terms of one source of rows, of all images together."""
    parts = {
        "hcls": (rows.objects, s.head_cls_w, s.head_cls_t),
        "hcls_back": (rows.background, s.head_cls_back_w, s.head_cls_back_t),
    }
    if s.head_cls_rows != "decouple":
        chosen = rows.objects | rows.background
        if s.head_cls_rows != "all":
            chosen = chosen & (rows.teacher.argmax(dim=1) == rows.labels)
        if s.head_cls_rows == "cfore":
            chosen = chosen & rows.objects
        parts = {"hcls": (chosen, s.head_cls_w, s.head_cls_t)}
    return {
        name: weight * divergence(rows.student[chosen], rows.teacher[chosen], temperature, background)
        for name, (chosen, weight, temperature) in parts.items()
        if weight > 0
    }


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


# ------------------------------------------------------------------------------------------------ a step


class Step(NamedTuple):
    """What both detectors computed on a batch.

    Attributes:
        student, teacher: maps of the neck and of backbone stages.
        strides: of the neck's levels that are compared; stages: the names of those compared.
        anchors: (H, W, A, 4) by level.
        truth: boxes of each image; padded: (H, W) of the images.
        adapters: of the levels and stages that have one.
        rows: by source of proposals, of all images; background: their probabilities are a softmax.
    """

    student: Maps
    teacher: Maps
    strides: dict[str, int]
    stages: Sequence[str]
    anchors: dict[str, Tensor]
    truth: Sequence[Tensor]
    padded: Size
    adapters: Adapters
    rows: dict[str, RowSet]
    background: bool = True
    iteration: int = 0
    max_iter: int = 1

    def pairs(self, names: Sequence[str], relu: bool = False) -> dict[str, tuple[Tensor, Tensor]]:
        found = {}
        for name in names:
            teacher = self.teacher[name]
            student = adapted(self.student[name], self.adapters.get(name), relu, teacher.shape[-2:])
            found[name] = student, teacher
        return found

    def level_masks(self, kind: str, s: Any) -> Maps:
        sizes = {name: tuple(self.teacher[name].shape[-2:]) for name in self.strides}
        options = {"level_assign": s.level_assign, "finest_scale": s.finest_scale}
        inputs = kind, self.truth, sizes, self.strides, self.anchors
        return object_masks(*inputs, threshold=s.roi_phi, **options)

    def stage_masks(self) -> Maps:
        mask = stage_mask(self.truth, self.padded)
        return {name: picked(mask, self.teacher[name].shape[-2:]) for name in self.stages}


def defeat(step: Step, s: Any) -> dict[str, Tensor]:
    """All terms that have a weight, of DeFeat's settings."""
    terms, form = {}, (s.loss_form, s.reference_bugs)
    if s.hint_neck_w or s.hint_neck_back_w:
        found = region_losses(step.pairs(step.strides), step.level_masks(s.mask, s), *form)
        terms["neck"], terms["neck_back"] = s.hint_neck_w * found[0], s.hint_neck_back_w * found[1]
    if s.hint_bb_w or s.hint_bb_back_w:
        found = region_losses(step.pairs(step.stages, relu=True), step.stage_masks(), *form)
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


def fgfi(step: Step, s: Any) -> dict[str, Tensor]:
    """FGFI's term, without its weight."""
    pairs = step.pairs(step.strides, relu=s.adapter_relu)
    return {"loss_fgfi": region_losses(pairs, step.level_masks("roi", s))[0]}


# -------------------------------------------------------------------------------------- the benchmark's


def formula(loss: Any) -> tuple[Callable, list[Tensor]]:
    """The terms of a DeFeat ``loss`` as a function of (student, teacher, batch), and the parameters, shared
    with the loss, that it trains."""
    s = loss.settings
    for name, expected in (("mask", "gt"), ("proposals", "student")):
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

    def compute(student: Any, teacher: Any, batch: Any) -> dict[str, Tensor]:
        truth = [item["instances"].gt_boxes.tensor for item in batch.inputs]
        terms = {}
        if loss.neck is not None:
            pairs, strides = loss.neck(student, teacher), loss.neck.strides
            sizes = {name: tuple(level.shape[-2:]) for name, (_, level) in pairs.items()}
            options = {"level_assign": s.level_assign, "finest_scale": s.finest_scale}
            masks = object_masks("gt", truth, sizes, strides, **options)
            found = region_losses(pairs, masks, s.loss_form, s.reference_bugs)
            terms["neck"] = s.hint_neck_w * found[0] + s.hint_neck_back_w * found[1]
        if loss.compares_heads:
            rows, background = _rows(loss, student, teacher, batch)
            terms.update(class_losses(rows, background, s))
        factor = decay(s.decay, batch.iteration, batch.max_iter or 1)
        return {name: factor * term for name, term in terms.items()}

    return compute, list(loss.parameters())


def _rows(loss: Any, student: Any, teacher: Any, batch: Any) -> tuple[RowSet, bool]:
    if loss.capability == "dense":
        student_rows, teacher_rows = student.dense(), teacher.dense()
        labels = student_rows.match(batch.truth.boxes, batch.truth.valid)
        objects, background = labels == 1, labels == 0
        labels = None
    else:
        student_rows, teacher_rows = student.box_head(), teacher.box_head(student.sampled_proposals())
        labels = student_rows.classes
        objects, background = labels < student_rows.num_classes, labels == student_rows.num_classes
        objects, background = objects & student_rows.valid, background & student_rows.valid
    parts = student_rows.logits, teacher_rows.logits, objects, background, labels
    return RowSet(
        *(part if part is None else part.flatten(0, 1) for part in parts)
    ), student_rows.background
