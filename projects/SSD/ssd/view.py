"""SSD's view: dense predictions over prior boxes, with a background class."""

from __future__ import annotations

import torch

from distill_d2.views.anchored import AnchoredHead
from distill_d2.views.base import register_view
from distill_d2.views.retinanet import RetinaNetView

from .ssd import SSD


@register_view(SSD)
class SSDView(RetinaNetView):
    has_background = True

    @property
    def fixed_size(self) -> int:
        return self.model.anchor_generator.size

    @property
    def probe_size(self) -> tuple[int, int]:
        return self.fixed_size, self.fixed_size

    def _head(self) -> AnchoredHead:
        return AnchoredHead(
            path="head",
            in_features=self.model.head_in_features,
            classes=self.num_classes,
            background=True,
            anchor_generator=self.model.anchor_generator,
            transform=self.model.box2box_transform,
            match=lambda boxes, valid, _anchors: self._match_once(boxes, valid)[1].to(torch.int8),
            assign=lambda boxes, valid: self._match_once(boxes, valid)[0],
        )

    def _match_once(self, boxes: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For ``match`` and ``assign``: once per step for the same tensor of boxes."""
        return self.once(("match", boxes), lambda: self._match_priors(boxes, valid))

    def _match_priors(
        self, boxes: torch.Tensor, valid: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        levels = [self.level(name, contiguous=False) for name in self.model.head_in_features]
        return self.model.match(boxes, valid, levels)
