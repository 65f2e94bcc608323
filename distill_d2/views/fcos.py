"""detectron2's FCOS: dense predictions over points, which are square anchors of their stride's size."""

from __future__ import annotations

from typing import List

import torch
from detectron2.modeling import FCOS
from detectron2.structures import Boxes

from .base import register_view
from .retinanet import RetinaNetView


@register_view(FCOS)
class FCOSView(RetinaNetView):
    has_centerness = True

    def _match(
        self, boxes: torch.Tensor, valid: torch.Tensor, anchors: List[Boxes]
    ) -> torch.Tensor:
        """FCOS' own rule: near the centre of a box, and of the level that its size belongs to."""
        quality = [self.model._match_anchors(Boxes(per_image), anchors) for per_image in boxes]
        matched = (torch.stack(quality) > 0) & valid[..., None]
        return matched.any(dim=1).to(torch.int8)
