"""The masks of a batch's objects on the levels that a loss compares, and the settings that choose them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from ..views import Batch, DetectorView
from .masks import Size, anchor_mask, box_mask, gaussian_mask, level_of_boxes, resized
from .pairing import Maps, Pairs

MASKS = ("gt", "roi", "gaussian", "one")
LEVEL_ASSIGNS = ("single", "all")
#: Comments of settings.
LEVEL_ASSIGN = "A box is drawn on the one level of its size (single), or on all levels."
FINEST_SCALE = (
    "Boxes of less than twice this scale (square root of the area, pixels) are on the finest level."
)


class ObjectMasks:
    """The masks of a step's ground truth on the levels that a loss compares."""

    def __init__(
        self,
        kind: str = "gt",
        *,
        level_assign: str = "single",
        finest_scale: float = 56.0,
        threshold: float = 0.5,
    ):
        """
        Args:
            kind: "gt" (box_mask), "roi" (anchor_mask, with the student's anchors), "gaussian" or "one"
                (1 everywhere).
            level_assign: a box is drawn on the "single" level of its size, or on "all".
            finest_scale: see level_of_boxes; threshold: see anchor_mask.
        """
        self.kind = kind
        self.level_assign = level_assign
        self.finest_scale = finest_scale
        self.threshold = threshold

    def bind(self, student: DetectorView, levels: Iterable[str], key: str) -> None:
        """Check that the student has what the masks need on these levels.

        Args:
            key: config key of the levels, for messages.

        Raises:
            TypeError, ValueError: it has no anchors, or none there.
        """
        if self.kind != "roi":
            return
        student.require("anchors")
        without = [name for name in levels if name not in student.anchor_levels]
        if without:
            raise ValueError(
                f"{key}: the mask needs the student's anchors, but it has none on the levels {without}; "
                f"choose among {list(student.anchor_levels)}"
            )

    def of_pairs(
        self, student: DetectorView, batch: Batch, pairs: Pairs, strides: Mapping[str, int]
    ) -> Maps:
        """The masks for the maps of FeaturePairs."""
        sizes = {name: (t.shape[-2], t.shape[-1]) for name, (_, t) in pairs.items()}
        return self(student, batch, sizes, strides)

    @torch.no_grad()
    def __call__(
        self, student: DetectorView, batch: Batch, sizes: Mapping[str, Size], strides: Mapping[str, int]
    ) -> Maps:
        """The mask (N, H, W) of each level by name.

        Args:
            sizes: (H, W) of the levels; strides: in pixels.
        """
        boxes, valid = batch.truth.boxes, batch.truth.valid
        if self.kind == "one":
            return {name: boxes.new_ones(len(boxes), *size) for name, size in sizes.items()}
        anchors = student.anchors() if self.kind == "roi" else {}
        levels = level_of_boxes(boxes, len(sizes), self.finest_scale)
        masks = {}
        for index, name in enumerate(sorted(sizes, key=lambda name: strides[name])):
            drawn = valid & (levels == index) if self.level_assign == "single" else valid
            if self.kind == "roi":
                mask = anchor_mask(boxes, drawn, anchors[name], self.threshold)
                masks[name] = resized(mask, sizes[name])  # if the student's map has another size
                continue
            draw = box_mask if self.kind == "gt" else gaussian_mask
            masks[name] = draw(boxes, drawn, sizes[name], strides[name])
        return masks
