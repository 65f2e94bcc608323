"""GID as its formulas read, made of what detectron2 and fvcore have: an oracle for the package's version, and
the other side of its benchmark.

Nothing is shared with the package. Images are looped over, all boxes of both detectors decoded, all scores
sorted, and features pooled once for each term that uses them, as in its authors' code.

Shapes: N images, R rows (anchors, points or proposals), K classes, C channels, M instances. Boxes are absolute
XYXY pixels; sizes of images are (height, width).
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from typing import Any, Callable, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.layers import nms
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes, pairwise_ioa, pairwise_iou
from fvcore.nn import giou_loss, smooth_l1_loss
from torch import Tensor

SCALE_CLAMP = math.log(1000 / 16)  # of the deltas of width and height
TERMS = {
    "loss_gid_feature": "feature_weight",
    "loss_gid_relation": "relation_weight",
    "loss_gid_response_cls": "response_cls_weight",
    "loss_gid_response_reg": "response_reg_weight",
}


class Heads(NamedTuple):
    """What one detector computed: logits (N, R, K), or (N, R, K + 1) with the background last; deltas
    (N, R, 4 or 4 K); maps (N, C, H, W) by level; logits of the centerness (N, R)."""

    logits: Tensor
    deltas: Tensor
    maps: dict[str, Tensor]
    centerness: Tensor | None = None

    def double(self) -> Heads:
        maps = {name: level.double() for name, level in self.maps.items()}
        return self._replace(logits=self.logits.double(), deltas=self.deltas.double(), maps=maps)


class Rows(NamedTuple):
    """What the rows of N images are.

    Attributes:
        anchors: (N, R, 4); counts: how many of them each image has, the others only fill up.
        background: whether probabilities are a softmax with background.
        decode: (deltas (R, 4), anchors (R, 4)) -> boxes (R, 4).
        label: (anchors (R, 4), boxes (M, 4)) -> (R,): 1 for rows of the boxes.
    """

    anchors: Tensor
    counts: Sequence[int]
    background: bool
    decode: Callable[[Tensor, Tensor], Tensor]
    label: Callable[[Tensor, Tensor], Tensor]

    def of(self, image: int) -> Tensor:
        return self.anchors[image, : self.counts[image]]


class Instances(NamedTuple):
    """Those of one image, best first."""

    boxes: Tensor
    scores: Tensor
    rows: Tensor
    from_teacher: Tensor

    def kept(self, index: Tensor) -> Instances:
        return Instances(*(part[index] for part in self))


def decode_deltas(deltas: Tensor, anchors: Tensor, weights: Sequence[float] = (1, 1, 1, 1)) -> Tensor:
    sides, middles = anchors[:, 2:] - anchors[:, :2], (anchors[:, :2] + anchors[:, 2:]) / 2
    deltas = deltas / deltas.new_tensor(weights)
    middles = middles + deltas[:, :2] * sides
    sides = sides * deltas[:, 2:].clamp(max=SCALE_CLAMP).exp()
    return torch.cat([middles - sides / 2, middles + sides / 2], dim=1)


def decode_ltrb(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Deltas are distances to the sides, in units of the anchor's size."""
    sides, middles = anchors[:, 2:] - anchors[:, :2], (anchors[:, :2] + anchors[:, 2:]) / 2
    deltas = deltas.clamp(min=0)
    return torch.cat([middles - deltas[:, :2] * sides, middles + deltas[:, 2:] * sides], dim=1)


def labels_by(matcher: Matcher) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda anchors, boxes: matcher(pairwise_iou(Boxes(boxes), Boxes(anchors)))[1]


def fcos_labels(strides: Sequence[int], counts: Sequence[int], radius: float) -> Callable:
    """FCOS's own assignment: 1 for points near the middle of a box whose size is of their level."""
    of_row = torch.tensor(strides).repeat_interleave(torch.tensor(counts))
    low = torch.where(of_row == strides[0], 0, 4 * of_row)
    high = torch.where(of_row == strides[-1], math.inf, 8 * of_row)

    def label(anchors: Tensor, boxes: Tensor) -> Tensor:
        points = (anchors[:, :2] + anchors[:, 2:]) / 2
        off = (points - ((boxes[:, :2] + boxes[:, 2:]) / 2)[:, None]).abs().amax(dim=2)
        sides = torch.cat([points - boxes[:, None, :2], boxes[:, None, 2:] - points], dim=2)
        largest = sides.amax(dim=2)
        near = (off < radius * of_row) & (sides.amin(dim=2) > 0) & (low < largest) & (largest < high)
        return near.any(dim=0).int()

    return label


# ------------------------------------------------------------------------------------------ instances


def of_class(deltas: Tensor, classes: Tensor) -> Tensor:
    """Each row's deltas (R, 4) of its class, or the only ones."""
    if deltas.shape[1] == 4:
        return deltas
    return deltas.unflatten(1, (-1, 4))[torch.arange(len(deltas)), classes]


def _probabilities_and_boxes(
    heads: Heads, rows: Rows, image: int, centerness: bool
) -> tuple[Tensor, Tensor]:
    count = rows.counts[image]
    logits = heads.logits[image, :count]
    probabilities = logits.softmax(dim=1)[:, :-1] if rows.background else logits.sigmoid()
    if centerness and heads.centerness is not None:
        probabilities = probabilities * heads.centerness[image, :count, None].sigmoid()
    deltas = of_class(heads.deltas[image, :count], probabilities.argmax(dim=1))
    return probabilities, rows.decode(deltas, rows.of(image))


@torch.no_grad()
def select(
    teacher: Heads, student: Heads, rows: Rows, image: int, size: tuple[int, int], s: Any
) -> Instances:
    """The general instances of one image."""
    (teacher_scores, teacher_boxes), (student_scores, student_boxes) = (
        _probabilities_and_boxes(heads, rows, image, s.gi_centerness) for heads in (teacher, student)
    )
    lead = teacher_scores.amax(dim=1) - student_scores.amax(dim=1)
    scores = (
        lead.abs() if s.gi_score == "max_first" else (teacher_scores - student_scores).abs().amax(dim=1)
    )
    boxes = Boxes(torch.where((lead > 0)[:, None], teacher_boxes, student_boxes))
    boxes.clip(size)
    found = Instances(boxes.tensor, scores, torch.arange(len(scores), device=lead.device), lead > 0)
    found = found.kept(scores.sort(descending=True, stable=True).indices[: s.gi_pre_nms_topk])
    found = found.kept(Boxes(found.boxes).nonempty(s.gi_min_side) & (found.scores > 0))
    return found.kept(nms(found.boxes, found.scores, s.gi_nms_thresh)[: s.gi_post_nms_topk])


def categories(
    found: Instances, rows: Rows, image: int, truth: Tensor, thresholds: Sequence[float]
) -> dict[str, Tensor]:
    """Which of one image's instances are "pos", "semi_pos" and "neg"."""
    positive = rows.label(rows.of(image), truth)[found.rows] == 1
    covered = torch.zeros(len(found.boxes))
    if len(truth):
        covered = pairwise_ioa(Boxes(truth), Boxes(found.boxes)).amax(dim=0)
    low, high = thresholds
    return {
        "pos": positive,
        "semi_pos": ~positive & (covered >= high),
        "neg": ~positive & (covered < low),
    }


def all_instances(
    teacher: Heads, student: Heads, rows: Rows, sizes: Sequence, truth: Sequence[Tensor], s: Any
) -> list[Instances]:
    """Of each image, by the mode."""
    if s.gi_mode.lower() == "gt":
        ones = [(torch.ones(len(boxes)), torch.full((len(boxes),), -1)) for boxes in truth]
        return [Instances(boxes, o, r, r == 0) for boxes, (o, r) in zip(truth, ones)]
    found = [select(teacher, student, rows, image, size, s) for image, size in enumerate(sizes)]
    if s.gi_mode.lower() == "all":
        return found
    return [
        each.kept(categories(each, rows, image, truth[image], s.iou_thresholds)[s.gi_mode.lower()])
        for image, each in enumerate(found)
    ]


# ---------------------------------------------------------------------------------- features, relations


def pool(maps: dict[str, Tensor], strides: dict[str, int], boxes: Sequence[Tensor], s: Any) -> Tensor:
    """(M, C, side, side) at the M boxes of all images."""
    names = sorted(strides, key=strides.get)
    scales = [1 / strides[name] for name in names]
    pooler = ROIPooler(s.pooler_resolution, scales, s.pooler_sampling_ratio, "ROIAlignV2")
    boxes = [Boxes(of_image.to(maps[names[0]].dtype)) for of_image in boxes]
    return pooler([maps[name] for name in names], boxes)


def feature_loss(teacher: Tensor, student: Tensor, mode: str = "L2", beta: float = 0.0) -> Tensor:
    """Of pooled features (M, C, H, W); summed over channels, the mean over instances (and cells)."""
    count, _, height, width = student.shape
    if mode == "norm":
        return (teacher - student).flatten(1).norm(dim=1).sum() / max(1, count)
    if mode == "L2":
        total = F.mse_loss(student, teacher, reduction="sum")
    else:
        total = smooth_l1_loss(student, teacher, beta, reduction="sum")
    return total / max(1, count * height * width)


def relation_loss(
    teacher: Tensor, student: Tensor, images: Tensor, beta: float = 1.0, scope: str = "batch"
) -> Tensor:
    """Of pooled features (M, C, H, W) and the image (M,) of each; precise in float64."""
    if scope == "batch":
        images = torch.zeros_like(images)
    losses = [0 * student.sum()]
    for image in images.unique():
        in_image = images == image
        if in_image.sum() >= 3:
            losses.append(_relation(teacher[in_image], student[in_image], beta))
    return sum(losses) / max(1, len(losses) - 1)


def _relation(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    count = len(student)
    student_distances, teacher_distances = relative_distances(student), relative_distances(teacher)
    return smooth_l1_loss(student_distances, teacher_distances, beta, reduction="sum") / (
        count * count - count
    )


def relative_distances(pooled: Tensor) -> Tensor:
    """(M, M), in units of their mean."""
    features = pooled.flatten(1)
    squares = features.pow(2).sum(dim=1)
    distances = squares[:, None] + squares - 2 * features @ features.t()
    distances = distances.clamp(min=1e-12).sqrt()
    distances = distances * (1 - torch.eye(len(features), dtype=pooled.dtype, device=pooled.device))
    mean = distances.sum() / (distances > 0).sum()
    return distances / mean.clamp(min=1e-12)


# ------------------------------------------------------------------------------------------ responses


@torch.no_grad()
def response_masks(
    instances: Sequence[Instances], rows: Rows, truth: Sequence[Tensor], s: Any
) -> tuple[Tensor, Tensor]:
    """Which rows (N, R) belong to instances, for the classes and for the boxes."""
    cls = torch.zeros(rows.anchors.shape[:2], dtype=torch.bool, device=rows.anchors.device)
    reg = cls.clone()
    for image, found in enumerate(instances):
        anchors, count = rows.of(image), rows.counts[image]
        if s.response_mask == "inside":
            middles = (anchors[:, :2] + anchors[:, 2:]) / 2
            inside = (middles > found.boxes[:, None, :2]) & (middles < found.boxes[:, None, 2:])
            cls[image, :count] = inside.all(dim=2).any(dim=0)
        elif len(found.boxes):
            cls[image, :count] = rows.label(anchors, found.boxes) == 1
        reg[image] = cls[image]
        if s.response_reg_mask == "gi_pos":
            reg[image, :count] &= rows.label(anchors, truth[image]) == 1
    return cls, reg


def response_loss(
    teacher: Tensor, student: Tensor, mask: Tensor, mode: str, beta: float = 0.0
) -> Tensor:
    """Of logits (N, R, K) or deltas (N, R, 4), for the rows of the mask (N, R) and by their number.

    Modes are "BCE", "L1", "L2" and, for logits of a softmax with background, "CE".
    """
    teacher_rows, student_rows = teacher[mask], student[mask]
    if mode == "BCE":
        total = F.binary_cross_entropy_with_logits(student_rows, teacher_rows.sigmoid(), reduction="sum")
    elif mode == "CE":
        total = F.cross_entropy(student_rows, teacher_rows.softmax(dim=1), reduction="sum")
    elif mode == "L2":
        total = F.mse_loss(student_rows, teacher_rows, reduction="sum")
    else:
        total = smooth_l1_loss(student_rows, teacher_rows, beta, reduction="sum")
    return total / max(1, int(mask.sum()))


def compared_deltas(teacher: Heads, student: Heads, background: bool) -> tuple[Tensor, Tensor]:
    """(N, R, 4) of both, of the teacher's highest foreground class."""
    foreground = teacher.logits[..., :-1] if background else teacher.logits
    classes = foreground.argmax(dim=2)
    teacher_part, student_part = (
        torch.stack([of_class(*image) for image in zip(heads.deltas, classes)])
        for heads in (teacher, student)
    )
    return teacher_part, student_part


def box_loss(
    teacher: Tensor, student: Tensor, mask: Tensor, rows: Rows, mode: str, beta: float = 0.0
) -> Tensor:
    """``response_loss`` of deltas, with one more mode: "GIoU" of the decoded boxes."""
    if mode != "GIoU":
        return response_loss(teacher, student, mask, mode, beta)
    anchors = rows.anchors[mask].to(student.dtype)
    boxes = (rows.decode(deltas[mask], anchors) for deltas in (student, teacher))
    return giou_loss(*boxes, reduction="sum") / max(1, int(mask.sum()))


# ------------------------------------------------------------------------------------------ all of it


def terms(
    teacher: Heads,
    student: Heads,
    instances: Sequence[Instances],
    rows: Rows | None,
    truth: Sequence[Tensor],
    strides: dict[str, int],
    s: Any,
) -> dict[str, Tensor]:
    """The weighted terms, by GID's settings; the student's maps have been adapted."""
    found = {}
    if s.feature_weight or s.relation_weight:
        boxes = [each.boxes for each in instances]
        pooled = functools.partial(pool, strides=strides, boxes=boxes, s=s)
        images = torch.arange(len(boxes)).repeat_interleave(torch.tensor([len(b) for b in boxes]))
        both = teacher.maps, student.maps
        found["loss_gid_feature"] = feature_loss(
            *map(pooled, both), s.feature_mode, s.feature_smooth_l1_beta
        )
        found["loss_gid_relation"] = relation_loss(
            *map(pooled, both), images, s.relation_smooth_l1_beta, s.relation_scope
        )
    if s.response_cls_weight or s.response_reg_weight:
        cls, reg = response_masks(instances, rows, truth, s)
        mode = "CE" if rows.background and s.response_cls_mode == "BCE" else s.response_cls_mode
        logits = teacher.logits, student.logits
        found["loss_gid_response_cls"] = response_loss(*logits, cls, mode, s.response_cls_smooth_l1_beta)
        deltas = compared_deltas(teacher, student, rows.background)
        found["loss_gid_response_reg"] = box_loss(
            *deltas, reg, rows, s.response_reg_mode, s.response_reg_smooth_l1_beta
        )
    weights = {name: getattr(s, weight) for name, weight in TERMS.items()}
    return {name: weights[name] * term for name, term in found.items() if weights[name]}


# -------------------------------------------------------------------------------------- the benchmark's


def formula(loss: Any) -> tuple[Callable, list[Tensor]]:
    """The terms of a GID ``loss`` on RetinaNets as a function of (student, teacher, batch), and the
    parameters, shared with the loss, that it trains."""
    s = loss.settings
    for name, found, expected in (
        ("PREDICTIONS", loss.capability or "dense", "dense"),
        ("GI_CENTERNESS", s.gi_centerness, False),
        ("FEATURE_WEIGHT and RELATION_WEIGHT", "above 0" if s.pools else 0.0, "above 0"),
    ):
        if found != expected:
            sys.exit(
                "benchmark: --against-naive: the plain formula of GID is for RetinaNets with feature terms, "
                f"but MODEL.DISTILLER.GID.{name} is {found!r}, expected {expected!r}. Leave "
                "--against-naive out, or change this"
            )
    laid_out: list = []  # once: a plain teacher's outputs have this memory layout from the start

    def compute(student: Any, teacher: Any, batch: Any) -> dict[str, Tensor]:
        if not laid_out:
            maps, (logits, deltas) = loss.pairs.of_teacher(teacher), teacher.taps.output("head")
            laid_out.append({name: level.contiguous() for name, level in maps.items()})
            laid_out.append([[level.contiguous() for level in part] for part in (logits, deltas)])
        maps, outputs = laid_out
        adapted = loss.pairs.of_student(student, [level.shape[-2:] for level in maps.values()])
        model, classes = student.model, student.num_classes
        levels = [student.level(name, contiguous=False) for name in model.head_in_features]
        anchors = Boxes.cat(model.anchor_generator(levels)).tensor
        anchors = anchors.expand(len(batch.inputs), *anchors.shape)
        decode, label = model.box2box_transform.apply_deltas, labels_by(model.anchor_matcher)
        rows = Rows(anchors, [anchors.shape[1]] * len(anchors), False, decode, label)
        heads = (
            Heads(*_rows_of(outputs, classes), maps),
            Heads(*_rows_of(student.tap("head"), classes), adapted),
        )
        truth = [item["instances"].gt_boxes.tensor.to(anchors.device) for item in batch.inputs]
        found = all_instances(*heads, rows, batch.image_sizes, truth, loss.settings)
        return terms(*heads, found, rows, truth, loss.pairs.strides, loss.settings)

    return compute, list(loss.parameters())


def _rows_of(outputs: Sequence[Sequence[Tensor]], classes: int) -> list[Tensor]:
    return [
        torch.cat([permute_to_N_HWA_K(level, length) for level in levels], dim=1)
        for levels, length in zip(outputs, (classes, 4))
    ]
