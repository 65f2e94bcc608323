"""SOLOv2's view: its neck. It predicts masks, which losses on classes and boxes cannot compare."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distill_d2.views.base import DetectorView, register_view
from distill_d2.views.fcos import ANCHOR_STRIDES

from .solov2 import SOLOv2


@register_view(SOLOv2)
class SOLOv2View(DetectorView):
    offers = ("anchors",)
    class_losses = ("loss_cate",)
    box_losses = ()

    @property
    def num_classes(self) -> int:
        return self.model.num_classes

    @property
    def anchor_levels(self) -> Sequence[str]:
        return self.model.ins_in_features

    def anchors(self) -> dict[str, torch.Tensor]:
        """SOLOv2 has no anchors: squares of 8 strides around its positions, as ATSS has (arXiv 1912.02424)."""
        levels = {name: self.level(name, contiguous=False) for name in self.anchor_levels}
        return {
            name: _squares(level.shape[-2:], self.strides[name], level.device)
            for name, level in levels.items()
        }


def _squares(size: tuple[int, int], stride: int, device: torch.device) -> torch.Tensor:
    """(H, W, 1, 4), absolute XYXY."""
    y, x = ((torch.arange(side, device=device) + 0.5) * stride for side in size)
    center = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    half = ANCHOR_STRIDES * stride / 2
    return torch.cat([center - half, center + half], dim=-1)[:, :, None]
