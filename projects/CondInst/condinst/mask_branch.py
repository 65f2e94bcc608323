"""CondInst's mask branch: the features that all masks of an image are made from, and a semantic segmentation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import get_norm
from torch import nn


class MaskBranch(nn.Module):
    """Levels of the neck, refined, added at the finest resolution, and a tower of convolutions (Tian et
    al., ECCV 2020, arXiv 2003.05664, section 3.1)."""

    def __init__(
        self,
        *,
        in_features: Sequence[str],
        in_channels: int,
        channels: int = 128,
        out_channels: int = 8,
        num_convs: int = 4,
        norm: str = "BN",
        semantic_classes: int = 0,
        prior_prob: float = 0.01,
    ):
        """
        Args:
            in_features: names of the levels, from fine to coarse.
            in_channels: of them; channels: of the convolutions; out_channels: of the result.
            norm: as of detectron2's ``get_norm``; "none" or "" for none.
            semantic_classes: of the semantic segmentation; 0: there is none.
            prior_prob: of its classes at the start.
        """
        super().__init__()
        self.in_features = list(in_features)
        norm = "" if norm == "none" else norm
        self.refine = nn.ModuleList(_block(in_channels, channels, norm) for _ in in_features)
        tower = [_block(channels, channels, norm) for _ in range(num_convs)]
        self.tower = nn.Sequential(*tower, nn.Conv2d(channels, out_channels, kernel_size=1))
        self.seg_head = self.logits = None
        if semantic_classes:
            self.seg_head = nn.Sequential(
                _block(in_channels, channels, norm), _block(channels, channels, norm)
            )
            self.logits = nn.Conv2d(channels, semantic_classes, kernel_size=1)
            nn.init.constant_(self.logits.bias, -math.log((1 - prior_prob) / prior_prob))

    def forward(self, features: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            features: levels (N, C, H, W) by name.

        Returns:
            (N, out_channels, H, W) at the finest level's resolution; in training, the semantic
            segmentation's logits (N, K, H, W), if there is one.
        """
        finest, *others = (features[name] for name in self.in_features)
        x = self.refine[0](finest)
        for refine, level in zip(self.refine[1:], others):
            x = x + aligned_bilinear(refine(level), x.shape[-1] // level.shape[-1])
        semantic = self.training and self.seg_head is not None
        return self.tower(x), self.logits(self.seg_head(finest)) if semantic else None


def aligned_bilinear(x: torch.Tensor, factor: int) -> torch.Tensor:
    """Upsample (N, C, H, W) to (N, C, factor H, factor W), so that output pixel i is input pixel
    (i - factor // 2) / factor, interpolated, and at the border the border's."""
    if factor == 1:
        return x
    height, width = x.shape[-2:]
    x = F.pad(x, (0, 1, 0, 1), mode="replicate")
    size = (factor * height + 1, factor * width + 1)
    x = F.interpolate(x, size=size, mode="bilinear", align_corners=True)
    x = F.pad(x, (factor // 2, 0, factor // 2, 0), mode="replicate")
    return x[..., : factor * height, : factor * width]


def _block(in_channels: int, out_channels: int, norm: str) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=not norm)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    norms = [get_norm(norm, out_channels)] if norm else []
    return nn.Sequential(conv, *norms, nn.ReLU())
