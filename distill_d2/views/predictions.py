"""What a head predicts, in one layout for all detectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Callable

import torch
from detectron2.modeling.box_regression import Box2BoxTransform

Match = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Decode = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _not_given(*_inputs: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError("these Predictions were made without encode or assign")


@dataclass(frozen=True)
class Predictions:
    """A head's raw predictions for R rows of each of N images: anchors, points or proposals.

    The rows are those of all levels, from fine to coarse; inside a level of P = H W positions with A
    anchors each, the order is (H, W, anchor). Proposals are one level, with A = 1. Parts are kept per
    level, as views of the head's outputs, so that only what is read is copied.

    Attributes:
        logit_levels: per level (N, P, A, K) class logits; with ``background`` (N, P, A, K + 1).
        delta_levels: per level (N, P, A, 4) box regression in the detector's own parametrization;
            (N, P, A, 4 K) if each class has its own.
        anchors: (R, 4) or, where images differ, (N, R, 4): absolute XYXY pixels on the padded image.
        decode: (deltas (..., 4), anchors (..., 4)) -> boxes (..., 4), absolute XYXY.
        match: (boxes (N, M, 4), valid (N, M)) -> (N, R) int8: the detector's own assignment of boxes to
            rows: 1 for a row that belongs to a valid box, 0 for background, -1 for an ignored row.
        centerness_levels: per level (N, P, A, 1) logits; empty where a detector has none.
        background: the probabilities are a softmax, whose last class is the background; otherwise
            each class has a sigmoid.
        valid: (N, R) bool, False for padding rows; None: there is no padding.
        classes: (N, R) int64, the class of each row for the detector's own loss, K for the
            background; None if the rows have no classes of their own.
        encode: (boxes (..., 4), anchors (..., 4)) -> deltas (..., 4), the inverse of ``decode``; not
            finite where a box or an anchor has no area.
        assign: (boxes (N, M, 4), valid (N, M)) -> (N, R) int64: the box that each row belongs to, if
            ``match`` is 1 there.
        level_names: of the neck levels that the head predicts on, in the order of ``logit_levels``;
            empty for proposals.
    """

    logit_levels: Sequence[torch.Tensor]
    delta_levels: Sequence[torch.Tensor]
    anchors: torch.Tensor
    decode: Decode
    match: Match
    centerness_levels: Sequence[torch.Tensor] = ()
    background: bool = False
    valid: torch.Tensor | None = None
    classes: torch.Tensor | None = None
    encode: Decode = _not_given
    assign: Match = _not_given
    level_names: Sequence[str] = ()

    @property
    def num_classes(self) -> int:
        """K, the number of foreground classes."""
        return self.logit_levels[0].shape[-1] - self.background

    @property
    def logits_by_level(self) -> dict[str, torch.Tensor]:
        """``logit_levels`` by the name of the neck level; empty for proposals."""
        return dict(zip(self.level_names, self.logit_levels))

    @property
    def level_sizes(self) -> list[int]:
        """Number of rows of each level; they add up to R."""
        return [level.shape[1] * level.shape[2] for level in self.logit_levels]

    @property
    def row_mask(self) -> torch.Tensor:
        """(N, R) bool: False for padding rows."""
        if self.valid is not None:
            return self.valid
        shape = len(self.logit_levels[0]), sum(self.level_sizes)
        return self.logit_levels[0].new_ones(shape, dtype=torch.bool)

    @property
    def logits(self) -> torch.Tensor:
        """(N, R, K), or (N, R, K + 1) with ``background``: a copy of all levels."""
        return rows_of(self.logit_levels)

    @property
    def deltas(self) -> torch.Tensor:
        """(N, R, 4), or (N, R, 4 K) where each class has its own: a copy of all levels."""
        return rows_of(self.delta_levels)

    @property
    def class_specific(self) -> bool:
        """Whether each class has its own deltas."""
        return self.delta_levels[0].shape[-1] > 4

    def best_class(self) -> torch.Tensor:
        """(N, R) int64: the foreground class with the highest logit."""
        logits = self.logits
        return (logits[..., :-1] if self.background else logits).argmax(dim=-1)

    def deltas_of(self, classes: torch.Tensor | None) -> torch.Tensor:
        """(N, R, 4): the deltas for the given class of each row.

        Args:
            classes: (N, R) int64; K, the background, counts as K - 1. Read only if ``class_specific``.

        Raises:
            ValueError: there are no classes, but each class has its own deltas.
        """
        deltas = self.deltas
        if not self.class_specific:
            return deltas
        if classes is None:
            raise ValueError("each class has its own deltas, but the rows have no classes")
        deltas = deltas.unflatten(-1, (-1, 4))
        index = classes.clamp(max=self.num_classes - 1)[..., None, None]
        index = index.expand(*classes.shape, 1, 4)
        return deltas.gather(2, index).squeeze(2)

    def boxes(self) -> torch.Tensor:
        """(N, R, 4) decoded boxes; if you need only some rows, call ``decode`` on them."""
        deltas = self.deltas_of(self.best_class() if self.class_specific else None)
        return self.decode(deltas, self.anchors.expand_as(deltas))


def rows_of(levels: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate (N, P, A, ...) of all levels to (N, R, ...)."""
    return torch.cat([level.flatten(1, 2) for level in levels], dim=1)


def by_position(output: torch.Tensor, length: int) -> torch.Tensor:
    """A view of a head's output (N, A length, H, W) as (N, H W, A, length); nothing is copied."""
    split = output.flatten(2).unflatten(1, (-1, length))
    return split.permute(0, 3, 1, 2)


def encoder_of(transform) -> Decode:
    """``Predictions.encode`` by a box2box transform of detectron2."""
    if isinstance(transform, Box2BoxTransform):
        return lambda boxes, anchors: _encode(boxes, anchors, transform.weights)

    def encode(boxes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        flat = transform.get_deltas(anchors.reshape(-1, 4), boxes.reshape(-1, 4))
        return flat.view(boxes.shape)

    return encode


def _encode(boxes: torch.Tensor, anchors: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Box2BoxTransform's deltas; its own method waits for the device and refuses anchors without an area,
    such as those of padding rows."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    left, top, right, bottom = anchors.unbind(-1)
    width, height = right - left, bottom - top
    wx, wy, ww, wh = weights
    deltas = (
        wx * ((x1 + 0.5 * (x2 - x1)) - (left + 0.5 * width)) / width,
        wy * ((y1 + 0.5 * (y2 - y1)) - (top + 0.5 * height)) / height,
        ww * torch.log((x2 - x1) / width),
        wh * torch.log((y2 - y1) / height),
    )
    return torch.stack(deltas, dim=-1)


def decoder_of(transform) -> Decode:
    """``Predictions.decode`` by a box2box transform of detectron2."""

    def decode(deltas: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        flat = transform.apply_deltas(deltas.reshape(-1, 4), anchors.reshape(-1, 4))
        return flat.view(deltas.shape)

    return decode
