"""POTO's view: dense predictions over locations, as FCOS has them."""

from __future__ import annotations

from dataclasses import replace

import torch
from detectron2.structures import Boxes

from distill_d2.views import FCOSView, Predictions
from distill_d2.views.base import register_view

from .assignment import near_center
from .poto import POTO, product_logits


@register_view(POTO)
class POTOView(FCOSView):
    has_centerness = False
    class_losses = ("loss_cls",)
    box_losses = ("loss_box_reg",)

    def dense(self) -> Predictions:
        """With a max filter its logits are in the class logits: a sigmoid of these is the score."""
        found = super().dense()
        filters = found.centerness_levels
        if not filters:
            return found
        logits = [product_logits(*pair) for pair in zip(found.logit_levels, filters)]
        return replace(found, logit_levels=logits, centerness_levels=())

    def _match(self, boxes: torch.Tensor, valid: torch.Tensor, anchors: list[Boxes]) -> torch.Tensor:
        """Near the center of a box, on any level: the locations among which POTO chooses one."""
        rows, radius = Boxes.cat(anchors).tensor, self.model.center_sampling_radius
        near = torch.stack([near_center(per_image, rows, radius) for per_image in boxes])
        return (near & valid[..., None]).any(dim=1).to(torch.int8)
