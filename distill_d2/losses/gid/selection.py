"""General instances: the boxes where student and teacher disagree most (GID, general instance
selection module).

All shapes are fixed, with a mask of the filled slots, and NMS makes one step per box, for all images at
once, so nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...upload import upload
from ...views import Predictions
from ...views.matching import batched_iou

SCORES = ("classwise", "max_first")
_SLICE = 2**21  # elements


@dataclass(frozen=True)
class GeneralInstances:
    """K slots of each of N images, best first.

    Attributes:
        boxes: (N, K, 4) float32, absolute XYXY pixels inside the image.
        scores: (N, K) float32, how much the detectors disagree, 0 to 1.
        rows: (N, K) int64, the row of Predictions from which a box comes; -1: from none.
        from_teacher: (N, K) bool, whether it is the teacher's box, not the student's.
        valid: (N, K) bool, False for empty slots, whose other values are arbitrary, but finite.
    """

    boxes: torch.Tensor
    scores: torch.Tensor
    rows: torch.Tensor
    from_teacher: torch.Tensor
    valid: torch.Tensor


class GeneralInstanceSelection:
    """Scores every row, and selects the best rows' boxes by class-agnostic NMS."""

    def __init__(
        self,
        *,
        score: str = "classwise",
        centerness: bool = False,
        nms_thresh: float = 0.3,
        pre_nms_topk: int = 3000,
        post_nms_topk: int = 10,
        min_side: float = 10.0,
    ):
        """
        Args:
            score: with probabilities p_t of the teacher and p_s of the student, "classwise"
                max_c |p_t[c] - p_s[c]| (the paper's) or "max_first" |max_c p_t[c] - max_c p_s[c]| (the
                authors' code).
            centerness: multiply probabilities by the centerness if detectors have one.
            nms_thresh: a box that overlaps a better one by more IoU than this is dropped.
            pre_nms_topk: rows per image whose boxes are decoded.
            post_nms_topk: K.
            min_side: boxes must be wider and higher than this, in pixels.
        """
        self.score = score
        self.centerness = centerness
        self.nms_thresh = nms_thresh
        self.pre_nms_topk = pre_nms_topk
        self.post_nms_topk = post_nms_topk
        self.min_side = min_side

    @torch.no_grad()
    def __call__(
        self, teacher: Predictions, student: Predictions, image_sizes: Sequence[tuple[int, int]]
    ) -> GeneralInstances:
        """Select at most K instances per image.

        Args:
            teacher, student: predictions for the same rows.
            image_sizes: N (height, width) in pixels before padding; boxes are clipped to them.
        """
        scores, from_teacher = self.gaps(teacher, student)
        count = min(self.pre_nms_topk, scores.shape[1])
        scores, rows = scores.nan_to_num(nan=-1.0).topk(count)
        from_teacher = from_teacher.gather(1, rows)
        boxes = self._clip(_boxes(teacher, student, rows, from_teacher), image_sizes)
        picked, valid = first_kept(
            boxes, self._usable(boxes, scores), self.nms_thresh, self.post_nms_topk
        )
        return GeneralInstances(
            boxes=torch.where(valid[..., None], _at(boxes, picked), 0.0),
            scores=scores.gather(1, picked),
            rows=rows.gather(1, picked),
            from_teacher=from_teacher.gather(1, picked),
            valid=valid,
        )

    @torch.no_grad()
    def gaps(self, teacher: Predictions, student: Predictions) -> tuple[torch.Tensor, torch.Tensor]:
        """The score of every row (N, R), -1 for rows that are not valid, and whether the teacher is
        the more confident there (N, R)."""
        levels = []
        for level, logits in enumerate(student.logit_levels):
            parts = zip(*(self._gaps(teacher, student, level, some) for some in _slices(logits)))
            levels.append([torch.cat(part, dim=1).transpose(1, 2).flatten(1) for part in parts])
        scores, from_teacher = (torch.cat(parts, dim=1) for parts in zip(*levels))
        if student.valid is not None:
            scores = torch.where(student.valid, scores, -1.0)
        return scores, from_teacher

    def _gaps(
        self, teacher: Predictions, student: Predictions, level: int, anchors: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``gaps`` of some of the A anchors of a level, (N, A, P) each."""
        p_teacher = self._probabilities(teacher, level, anchors)
        p_student = self._probabilities(student, level, anchors)
        from_teacher = p_teacher.amax(dim=2) > p_student.amax(dim=2)
        return p_teacher.sub_(p_student).abs_().amax(dim=2), from_teacher

    def _probabilities(self, predictions: Predictions, level: int, anchors: slice) -> torch.Tensor:
        """(N, A, K, P) of the foreground classes; (N, A, 1, P), the largest, for "max_first"."""
        # Positions last is the memory layout of a convolution's output.
        logits = predictions.logit_levels[level].permute(0, 2, 3, 1)[:, anchors]
        if predictions.background:
            probabilities = logits.softmax(dim=2)[:, :, :-1]
        elif self.score == "max_first":
            probabilities = logits.amax(dim=2, keepdim=True).sigmoid()
        else:
            probabilities = logits.sigmoid()
        if self.score == "max_first":
            probabilities = probabilities.amax(dim=2, keepdim=True)
        if self.centerness and predictions.centerness_levels:
            centerness = predictions.centerness_levels[level].permute(0, 2, 3, 1)[:, anchors]
            probabilities = probabilities * centerness.sigmoid()
        return probabilities

    def _clip(self, boxes: torch.Tensor, image_sizes: Sequence[tuple[int, int]]) -> torch.Tensor:
        limits = torch.tensor([(w, h, w, h) for h, w in image_sizes], dtype=boxes.dtype)
        return boxes.clamp(min=0).minimum(upload(limits, boxes.device)[:, None])

    def _usable(self, boxes: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # score > 0: where both detectors agree exactly, there is nothing to learn.
        sides = boxes[..., 2:] - boxes[..., :2]
        return (sides > self.min_side).all(dim=-1) & boxes.isfinite().all(dim=-1) & (scores > 0)


def first_kept(
    boxes: torch.Tensor, usable: torch.Tensor, threshold: float, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ``count`` boxes of each image that greedy NMS keeps.

    Args:
        boxes: (N, T, 4) absolute XYXY, best first; usable: (N, T) bool, False for boxes to leave out.
        threshold: boxes are dropped that overlap a kept one by more IoU than this.

    Returns:
        their indices (N, count), and (N, count) bool, False for empty slots.
    """
    picked, valid = [], []
    for _ in range(count):
        best = usable.int().argmax(dim=1, keepdim=True)  # the first that remains
        picked.append(best)
        valid.append(usable.gather(1, best))
        overlap = batched_iou(_at(boxes, best), boxes).squeeze(1)
        usable = (usable & ~(overlap > threshold)).scatter(1, best, False)
    return torch.cat(picked, dim=1), torch.cat(valid, dim=1)


def _boxes(
    teacher: Predictions, student: Predictions, rows: torch.Tensor, from_teacher: torch.Tensor
) -> torch.Tensor:
    """Decoded boxes (N, T, 4) of the given rows (N, T), each by the deltas of one detector."""
    of_teacher, of_student = (_at(_own_deltas(p), rows) for p in (teacher, student))
    deltas = torch.where(from_teacher[..., None], of_teacher, of_student)
    deltas = deltas.masked_fill(deltas.isinf(), torch.nan)  # clamping could make a box of inf
    anchors = student.anchors.expand(len(rows), *student.anchors.shape[-2:])
    return student.decode(deltas, _at(anchors, rows))


def _own_deltas(predictions: Predictions) -> torch.Tensor:
    """(N, R, 4), of the class that the detector itself ranks highest."""
    if not predictions.class_specific:
        return predictions.deltas
    return predictions.deltas_of(predictions.best_class())


def _slices(logits: torch.Tensor) -> list[slice]:
    """The anchors of a level (N, P, A, K), in slices that keep temporary tensors small. Large temporaries are
    returned to the OS and re-acquired on every call, which costs more than the arithmetic on a CPU."""
    count = logits.shape[2]
    step = max(1, _SLICE * count // max(1, logits.numel()))
    return [slice(first, first + step) for first in range(0, count, step)]


def _at(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(N, R, 4) at (N, T): (N, T, 4)."""
    return values.gather(1, index[..., None].expand(*index.shape, values.shape[-1]))
