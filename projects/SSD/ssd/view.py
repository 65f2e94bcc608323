"""SSD's view: dense predictions over prior boxes, with a background class."""

from __future__ import annotations

from typing import Dict, Sequence, Tuple

import torch

from distill_d2.views.anchored import AnchoredHead
from distill_d2.views.base import DetectorView, register_view
from distill_d2.views.predictions import Predictions

from .ssd import SSD


@register_view(SSD)
class SSDView(DetectorView):
    offers = ("dense", "anchors")
    has_background = True

    @property
    def num_classes(self) -> int:
        return self.model.num_classes

    @property
    def probe_size(self) -> Tuple[int, int]:
        return (self.model.anchor_generator.size,) * 2

    def require(self, capability: str) -> None:
        super().require(capability)
        if capability == "dense":
            self.taps.add("head")

    def dense(self) -> Predictions:
        return self._head().predictions(self)

    @property
    def anchor_levels(self) -> Sequence[str]:
        return self.model.head_in_features

    def anchors(self) -> Dict[str, torch.Tensor]:
        return self._head().grids(self)

    def sample_boxes(self, capability: str) -> Tuple[torch.Tensor, torch.Tensor]:
        return self._head().sample()

    def _head(self) -> AnchoredHead:
        return AnchoredHead(
            path="head",
            in_features=self.model.head_in_features,
            classes=self.num_classes,
            background=True,
            anchor_generator=self.model.anchor_generator,
            transform=self.model.box2box_transform,
            match=lambda boxes, valid, _anchors: self._match(boxes, valid)[1].to(torch.int8),
            assign=lambda boxes, valid: self._match(boxes, valid)[0],
        )

    def _match(
        self, boxes: torch.Tensor, valid: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        levels = [self.level(name, contiguous=False) for name in self.model.head_in_features]
        return self.model.match(boxes, valid, levels)
