"""GID of RetinaNets as its formulas read, made of what detectron2 has: what the loss is compared to.

Images are looped over, all boxes of both detectors decoded, all scores sorted, and features pooled once
for each term that uses them, as in its authors' code.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Callable

import torch
import torch.nn.functional as F
from detectron2.layers import nms
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes, pairwise_iou
from fvcore.nn import smooth_l1_loss

from distill_d2.taps import map_tensors

Tensors = list[torch.Tensor]

# What the formula below can do, where the loss can do more.
MODES = {
    "gi_mode": "all",
    "feature_mode": "L2",
    "relation_scope": "batch",
    "response_mask": "matcher",
    "response_cls_mode": "BCE",
    "response_reg_mode": "L1",
    "response_reg_mask": "gi",
}
WEIGHTS = ("feature_weight", "relation_weight", "response_cls_weight", "response_reg_weight")


def plain_gid(loss: Any) -> tuple[Callable, Tensors]:
    """The terms of a GID ``loss`` as a function of (student, teacher, batch), and the parameters, shared
    with the loss, that it trains.

    Raises:
        SystemExit: the formula lacks what the loss is set to.
    """
    check_modes(loss)
    s = loss.settings
    laid_out: list = []  # once: a plain teacher's outputs have this memory layout from the start

    def compute(student, teacher, batch) -> dict[str, torch.Tensor]:
        if not laid_out:
            outputs = loss.pairs.of_teacher(teacher), teacher.taps.output("head")
            laid_out.extend(map_tensors(torch.Tensor.contiguous, outputs))
        their_maps, their_outputs = laid_out
        sizes = [level.shape[-2:] for level in their_maps.values()]
        our_maps = loss.pairs.of_student(student, sizes)
        t_logits, t_deltas, t_boxes = read_head(teacher, their_outputs)
        s_logits, s_deltas, s_boxes = read_head(student, student.tap("head"))
        boxes = [
            select(*image, s) for image in zip(t_logits, s_logits, t_boxes, s_boxes, batch.image_sizes)
        ]
        strides = loss.pairs.strides
        pooled = [pool(maps, strides, boxes, s) for maps in (their_maps, our_maps, their_maps, our_maps)]
        mask = response_mask(student.model.anchor_matcher, boxes, anchors_of(student))
        return {
            "loss_gid_feature": s.feature_weight * feature_loss(*pooled[:2]),
            "loss_gid_relation": s.relation_weight
            * relation_loss(*pooled[2:], beta=s.relation_smooth_l1_beta),
            "loss_gid_response_cls": s.response_cls_weight * cls_loss(t_logits, s_logits, mask),
            "loss_gid_response_reg": s.response_reg_weight
            * reg_loss(t_deltas, s_deltas, mask, beta=s.response_reg_smooth_l1_beta),
        }

    return compute, list(loss.parameters())


def check_modes(loss: Any) -> None:
    settings = {**vars(loss.settings), "predictions": loss.capability or "dense"}
    wrong = {
        name: f"expected {mode!r}"
        for name, mode in {"predictions": "dense", **MODES}.items()
        if settings[name] != mode
    }
    wrong.update((name, "expected more than 0") for name in WEIGHTS if settings[name] == 0)
    if not wrong:
        return
    listed = "; ".join(
        f"MODEL.DISTILLER.GID.{name.upper()} is {settings[name]!r}, {expected}"
        for name, expected in wrong.items()
    )
    sys.exit(
        "benchmark: --against-naive: the plain formula of GID is for RetinaNets and the default modes "
        f"alone, but {listed}. Leave --against-naive out, or change these"
    )


def anchors_of(view: Any) -> list[Boxes]:
    """Per level."""
    levels = [view.level(name, contiguous=False) for name in view.model.head_in_features]
    return view.model.anchor_generator(levels)


def read_head(view: Any, outputs: Sequence[Tensors]) -> tuple[torch.Tensor, torch.Tensor, Tensors]:
    """Logits (N, R, K), deltas (N, R, 4), and each image's decoded boxes (R, 4)."""
    logits, deltas = (
        torch.cat([permute_to_N_HWA_K(level, length) for level in levels], dim=1)
        for levels, length in zip(outputs, (view.num_classes, 4))
    )
    anchors = Boxes.cat(anchors_of(view)).tensor
    transform = view.model.box2box_transform
    return logits, deltas, [transform.apply_deltas(image, anchors) for image in deltas]


def select(
    teacher: torch.Tensor,
    student: torch.Tensor,
    teacher_boxes: torch.Tensor,
    student_boxes: torch.Tensor,
    image_size: tuple[int, int],
    s: Any,
) -> Boxes:
    """One image's instances, from logits (R, K) and boxes (R, 4)."""
    teacher, student = teacher.sigmoid(), student.sigmoid()
    lead = teacher.max(dim=1).values - student.max(dim=1).values
    scores = lead.abs() if s.gi_score == "max_first" else (teacher - student).abs().max(dim=1).values
    boxes = torch.where((lead > 0)[:, None], teacher_boxes, student_boxes)
    best = scores.sort(descending=True).indices[: s.gi_pre_nms_topk]
    boxes, scores = Boxes(boxes[best]), scores[best]
    boxes.clip(image_size)
    usable = boxes.nonempty(s.gi_min_side) & (scores > 0)
    boxes, scores = boxes[usable], scores[usable]
    return boxes[nms(boxes.tensor, scores, s.gi_nms_thresh)[: s.gi_post_nms_topk]]


def pool(
    maps: dict[str, torch.Tensor], strides: dict[str, int], boxes: list[Boxes], s: Any
) -> torch.Tensor:
    """(M, C, side, side) at the M boxes of all images."""
    names = sorted(maps, key=strides.get)
    pooler = ROIPooler(
        output_size=s.pooler_resolution,
        scales=[1 / strides[name] for name in names],
        sampling_ratio=s.pooler_sampling_ratio,
        pooler_type="ROIAlignV2",
    )
    return pooler([maps[name] for name in names], boxes)


def feature_loss(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Of pooled features (M, C, side, side)."""
    count, _, height, width = student.shape
    return F.mse_loss(student, teacher, reduction="sum") / max(1, count * height * width)


def relation_loss(teacher: torch.Tensor, student: torch.Tensor, beta: float) -> torch.Tensor:
    """Of pooled features (M, C, side, side)."""
    count = len(student)
    if count < 3:
        return 0 * student.sum()
    ours, theirs = relative_distances(student), relative_distances(teacher)
    return smooth_l1_loss(ours, theirs, beta, reduction="sum") / (count * count - count)


def relative_distances(pooled: torch.Tensor) -> torch.Tensor:
    """(M, M), in units of their mean."""
    features = pooled.flatten(1)
    squares = features.pow(2).sum(dim=1)
    distances = squares[:, None] + squares - 2 * features @ features.t()
    distances = distances.clamp(min=1e-12).sqrt()
    distances = distances * (1 - torch.eye(len(features), device=features.device))
    mean = distances.sum() / (distances > 0).sum()
    return distances / mean.clamp(min=1e-12)


@torch.no_grad()
def response_mask(matcher: Any, boxes: list[Boxes], anchors: list[Boxes]) -> torch.Tensor:
    """Which rows (N, R) belong to instances."""
    all_anchors = Boxes.cat(anchors)
    labels = [matcher(pairwise_iou(image, all_anchors))[1] for image in boxes]
    return torch.stack(labels) > 0


def cls_loss(teacher: torch.Tensor, student: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of logits (N, R, K)."""
    loss = F.binary_cross_entropy_with_logits(student[mask], teacher[mask].sigmoid(), reduction="sum")
    return loss / mask.sum().clamp(min=1)


def reg_loss(
    teacher: torch.Tensor, student: torch.Tensor, mask: torch.Tensor, beta: float
) -> torch.Tensor:
    """Of deltas (N, R, 4)."""
    loss = smooth_l1_loss(student[mask], teacher[mask], beta, reduction="sum")
    return loss / mask.sum().clamp(min=1)
