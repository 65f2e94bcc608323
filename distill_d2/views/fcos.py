"""detectron2's FCOS: dense predictions over points, which are square anchors of their stride's size."""

from __future__ import annotations

import torch
from detectron2.modeling import FCOS
from detectron2.structures import Boxes

from .base import register_view
from .retinanet import RetinaNetView

ANCHOR_STRIDES = 8


@register_view(FCOS)
class FCOSView(RetinaNetView):
    has_centerness = True
    class_losses = ("loss_fcos_cls",)
    box_losses = ("loss_fcos_loc",)

    def anchors(self) -> dict[str, torch.Tensor]:
        """FCOS has no anchors: squares of 8 strides around its points, as ATSS has (arXiv 1912.02424)."""
        return {name: _enlarge(boxes, ANCHOR_STRIDES) for name, boxes in super().anchors().items()}

    def _match(self, boxes: torch.Tensor, valid: torch.Tensor, anchors: list[Boxes]) -> torch.Tensor:
        """FCOS' own rule: near the center of a box, and of the level that its size belongs to."""
        quality = [self.model._match_anchors(Boxes(per_image), anchors) for per_image in boxes]
        matched = (torch.stack(quality) > 0) & valid[..., None]
        return matched.any(dim=1).to(torch.int8)


def _enlarge(boxes: torch.Tensor, factor: float) -> torch.Tensor:
    """Scale the sides of boxes (..., 4) by ``factor``, around the same centers."""
    corners = boxes.unflatten(-1, (2, 2))
    center = corners.mean(dim=-2, keepdim=True)
    return (center + (corners - center) * factor).flatten(-2)
