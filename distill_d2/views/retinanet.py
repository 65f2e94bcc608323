"""RetinaNet's view: dense predictions over anchors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling import RetinaNet
from detectron2.structures import Boxes

from .anchored import AnchoredHead
from .base import DetectorView, register_view
from .matching import match_by_iou
from .predictions import Predictions


@register_view(RetinaNet)
class RetinaNetView(DetectorView):
    offers = ("dense", "anchors")
    image_heads = ("dense",)

    @property
    def num_classes(self) -> int:
        return self.model.num_classes

    def require(self, capability: str) -> None:
        super().require(capability)
        if capability == "dense":
            self.taps.add("head")

    def dense(self) -> Predictions:
        return self._head().predictions(self)

    @property
    def anchor_levels(self) -> Sequence[str]:
        return self.model.head_in_features

    def anchors(self) -> dict[str, torch.Tensor]:
        return self._head().grids(self)

    def sample_boxes(self, capability: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self._head().sample()

    def _head(self) -> AnchoredHead:
        return AnchoredHead(
            path="head",
            in_features=self.model.head_in_features,
            classes=self.num_classes,
            anchor_generator=self.model.anchor_generator,
            transform=self.model.box2box_transform,
            match=self._match,
        )

    def _match(self, boxes: torch.Tensor, valid: torch.Tensor, anchors: list[Boxes]) -> torch.Tensor:
        return match_by_iou(self.model.anchor_matcher, boxes, valid, Boxes.cat(anchors).tensor)
