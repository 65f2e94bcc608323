"""POTO's head: that of FCOS without centerness, with the 3D max filter as an option."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from distill_d2.projects.fcos.head import Scale
from torch import nn


class MaxFiltering(nn.Module):
    """3D max filtering (section 3.3): the largest value near each in space and scale, and the input."""

    def __init__(self, channels: int, kernel_size: int = 3, tau: int = 2, norm: str = "GN"):
        """
        Args:
            kernel_size: side of the window on a level, odd.
            tau: how many levels next to a level, finer and coarser together, belong to it; even.

        Raises:
            ValueError: the window has no center.
        """
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(
                f"MODEL.POTO.FILTER_KERNEL_SIZE is {kernel_size}; expected an odd number above 0"
            )
        if tau < 0 or tau % 2:
            raise ValueError(f"MODEL.POTO.FILTER_TAU is {tau}; expected an even number, 0 or more")
        self.kernel_size = kernel_size
        self.reach = tau // 2
        self.conv = _conv3x3(channels, channels)
        self.norm = get_norm(norm, channels) or nn.Identity()

    def forward(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """From levels (N, C, H, W), fine to coarse, to as many of the same shapes."""
        hidden = [self.conv(feature) for feature in features]
        outputs = []
        for level, feature in enumerate(features):
            near = hidden[max(0, level - self.reach) : level + self.reach + 1]
            size = feature.shape[-2:]
            near = [F.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in near]
            highest = torch.stack(near).amax(dim=0)
            highest = F.max_pool2d(highest, self.kernel_size, 1, self.kernel_size // 2)
            outputs.append(highest + feature)
        return [F.relu(self.norm(x)) for x in outputs]


class POTOHead(RetinaNetHead):
    """Class logits, box deltas and, with a max filter, filter logits for each location."""

    @configurable
    def __init__(
        self,
        *,
        input_shape: Sequence[ShapeSpec],
        num_classes: int,
        conv_dims: Sequence[int],
        norm: str = "GN",
        prior_prob: float = 0.01,
        max_filtering: MaxFiltering | None = None,
    ):
        """
        Args:
            input_shape: of the levels.
            conv_dims: channels of each convolution of the towers; norm: of these.
            prior_prob: of every class for a start.
        """
        super().__init__(
            input_shape=list(input_shape),
            num_classes=num_classes,
            num_anchors=1,
            conv_dims=list(conv_dims),
            norm=norm,
            prior_prob=prior_prob,
        )
        self.scales = nn.ModuleList(Scale() for _ in input_shape)
        self.max3d = max_filtering
        self.filter = None if max_filtering is None else _conv3x3(conv_dims[-1], 1)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Sequence[ShapeSpec]) -> dict[str, Any]:
        node, channels = cfg.MODEL.POTO, input_shape[0].channels
        window = node.FILTER_KERNEL_SIZE, node.FILTER_TAU, node.FILTER_NORM
        return {
            "input_shape": input_shape,
            "num_classes": node.NUM_CLASSES,
            "conv_dims": [channels] * node.NUM_CONVS,
            "norm": node.NORM,
            "prior_prob": node.PRIOR_PROB,
            "max_filtering": MaxFiltering(channels, *window) if node.USE_3DMF else None,
        }

    def forward(self, features: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], ...]:
        """From levels (N, C, H, W) to logits (N, K, H, W) and deltas (N, 4, H, W): distances to the
        left, top, right and bottom side, in strides, where negative ones stand for 0. With a max
        filter also to its logits (N, 1, H, W)."""
        towers = [self.bbox_subnet(feature) for feature in features]
        logits = [self.cls_score(self.cls_subnet(feature)) for feature in features]
        deltas = [scale(self.bbox_pred(tower)) for scale, tower in zip(self.scales, towers)]
        if self.max3d is None:
            return logits, deltas
        return logits, deltas, [self.filter(x) for x in self.max3d(towers)]


def _conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    layer = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer
