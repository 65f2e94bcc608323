"""Heads that predict for anchors on every position of the neck: RetinaNet's, FCOS's, the RPN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Callable

import torch
from detectron2.structures import Boxes

from ..taps import find_module
from .base import DetectorView
from .matching import assign_by_iou
from .predictions import Match, Predictions, by_position, decoder_of, encoder_of


@dataclass(frozen=True)
class AnchoredHead:
    """Where such a head is in a detector.

    Attributes:
        path: dotted name of the module; it takes the levels and returns lists of (N, A length, H, W):
            class logits, deltas and, optionally, centerness; what follows is not read.
        in_features: names of the neck levels that it takes.
        classes: number of foreground classes.
        anchor_generator, transform: detectron2's.
        match: (boxes (N, M, 4), valid (N, M), anchors per level) -> labels, see Predictions.match.
        assign: see Predictions.assign; None: the box that an anchor overlaps most.
        background: whether the background is one more class.
    """

    path: str
    in_features: Sequence[str]
    classes: int
    anchor_generator: Any
    transform: Any
    match: Callable[[torch.Tensor, torch.Tensor, list[Boxes]], torch.Tensor]
    assign: Match | None = None
    background: bool = False

    def predictions(self, view: DetectorView) -> Predictions:
        """What the head computed in this step; the teacher's runs here, the student's has run."""
        features = [view.level(name, contiguous=False) for name in self.in_features]
        if not view.taps.has(self.path):
            with view.context():
                find_module(view.model, self.path)(features)  # its tap remembers the outputs
        logits, deltas, *others = view.own_output(self.path)
        anchors = self.anchor_generator(features)
        rows = torch.cat([boxes.tensor for boxes in anchors])
        return Predictions(
            logit_levels=[by_position(level, self.classes + self.background) for level in logits],
            delta_levels=[by_position(level, 4) for level in deltas],
            centerness_levels=[by_position(level, 1) for levels in others[:1] for level in levels],
            anchors=rows,
            decode=decoder_of(self.transform),
            match=lambda boxes, valid: self.match(boxes, valid, anchors),
            background=self.background,
            encode=encoder_of(self.transform),
            assign=self.assign or (lambda boxes, valid: assign_by_iou(boxes, valid, rows)),
            level_names=tuple(self.in_features),
        )

    def grids(self, view: DetectorView) -> dict[str, torch.Tensor]:
        """The anchors of each level by name, (H, W, A, 4)."""
        levels = [view.level(name, contiguous=False) for name in self.in_features]
        return {
            name: boxes.tensor.view(*level.shape[-2:], -1, 4)
            for name, level, boxes in zip(self.in_features, levels, self.anchor_generator(levels))
        }

    def sample(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Anchors of a 2x2 grid on every level, (R, 4), and what fixed deltas make of them, (R, 4):
        equal for heads whose predictions can be compared row by row."""
        device = next(self.anchor_generator.buffers()).device
        grid = [torch.empty(1, 1, 2, 2, device=device) for _ in self.in_features]
        anchors = torch.cat([boxes.tensor for boxes in self.anchor_generator(grid)])
        return anchors, decode_sample(self.transform, anchors)


def decode_sample(transform: Any, anchors: torch.Tensor) -> torch.Tensor:
    """Boxes (R, 4) that fixed deltas make of anchors (R, 4)."""
    deltas = torch.tensor([0.1, 0.2, 0.3, 0.4], device=anchors.device).expand_as(anchors)
    return transform.apply_deltas(deltas, anchors)
