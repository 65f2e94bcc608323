"""From FCOS' predictions to detections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.layers import batched_nms
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from detectron2.structures import Boxes, Instances

from distill_d2.tracing import at_most

#: Distances to the sides of a box, in sides of the square that stands for a location.
TRANSFORM = Box2BoxTransformLinear(normalize_by_size=True)


@dataclass(frozen=True)
class Selection:
    """Which predictions become detections.

    Attributes:
        threshold: class probabilities above this are candidates; with_quality: times the quality.
        pre_nms_topk: most candidates per level and image; post_nms_topk: most detections per image.
        nms_threshold: IoU above which the worse of two boxes of a class is dropped.
    """

    threshold: float = 0.05
    with_quality: bool = False
    pre_nms_topk: int = 1000
    nms_threshold: float = 0.6
    post_nms_topk: int = 100

    @torch.no_grad()
    def detect(
        self,
        outputs: Sequence[Sequence[torch.Tensor]],
        anchors: Sequence[Boxes],
        image_sizes: Sequence[tuple[int, int]],
    ) -> list[Instances]:
        """N images' detections, by falling score: the square root of probability times quality (arXiv
        2006.09214, eq. 4).

        Args:
            outputs: of FCOSHead; a fourth, (N, P, H, W) per level, becomes "top_feat" (M, P).
            anchors: per level, squares of the stride's size around the locations.
            image_sizes: heights and widths in pixels.

        Returns:
            Instances with "pred_boxes", not clipped, "scores", "pred_classes", "locations" (M, 2), x and
            y of the point that predicted it, and "fpn_levels", the index of its level.
        """
        logits, *others = ([level.float().flatten(2) for level in levels] for levels in outputs)
        scores = [level.sigmoid() for level in logits]
        qualities = [level.sigmoid() for level in others[1]]
        joint = [score * quality for score, quality in zip(scores, qualities)]
        levels = list(zip(joint if self.with_quality else scores, joint, others[0], *others[2:]))
        return [
            self._of_image([[part[i] for part in level] for level in levels], anchors, size)
            for i, size in enumerate(image_sizes)
        ]

    def _of_image(
        self,
        levels: Sequence[Sequence[torch.Tensor]],
        anchors: Sequence[Boxes],
        image_size: tuple[int, int],
    ) -> Instances:
        candidates = Instances.cat(
            [
                self._of_level(index, image_size, squares.tensor, *level)
                for index, (level, squares) in enumerate(zip(levels, anchors))
            ]
        )
        boxes, classes = candidates.pred_boxes.tensor, candidates.pred_classes
        keep = batched_nms(boxes, candidates.scores, classes, self.nms_threshold)
        return candidates[keep[: self.post_nms_topk]]

    def _of_level(
        self,
        index: int,
        image_size: tuple[int, int],
        squares: torch.Tensor,
        compared: torch.Tensor,
        joint: torch.Tensor,
        ltrb: torch.Tensor,
        *others: torch.Tensor,
    ) -> Instances:
        """Of (K, P) scores compared with the threshold, (K, P) final ones, (4, P) distances."""
        classes, rows = (compared > self.threshold).nonzero(as_tuple=True)
        best, order = joint[classes, rows].topk(at_most(rows.shape[0], self.pre_nms_topk))
        classes, rows = classes[order], rows[order]
        squares = squares[rows]
        found = Instances(
            image_size,
            pred_boxes=Boxes(TRANSFORM.apply_deltas(ltrb[:, rows].t(), squares)),
            scores=best.sqrt(),
            pred_classes=classes,
            locations=(squares[:, :2] + squares[:, 2:]) / 2,
            fpn_levels=torch.full_like(rows, index),
        )
        for values in others:
            found.top_feat = values[:, rows].t()
        return found
