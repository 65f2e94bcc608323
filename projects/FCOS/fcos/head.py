"""FCOS' head: two towers of convolutions, shared by all levels, and three predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .deformable import DeformConv2d, DFConv2d

NORMS = ("GN", "NaiveGN", "BN", "SyncBN", "none")
_GROUP_NORMS, _GROUPS = ("GN", "NaiveGN"), 32

Levels = list[torch.Tensor]


class LevelNorms(nn.ModuleList):
    """A batch norm per level: what shared convolutions make of each has its own statistics."""


class Tower(nn.Sequential):
    """Convolutions with norms and ReLUs."""

    def forward(self, x: torch.Tensor, level: int) -> torch.Tensor:
        """(N, C, H, W) of the level with this index to the same."""
        for layer in self:
            x = layer[level](x) if isinstance(layer, LevelNorms) else layer(x)
        return x


class Scale(nn.Module):
    """A trained factor."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


class FCOSHead(nn.Module):
    """Class logits, distances to the sides of a box, and a quality per location (Tian et al., arXiv
    2006.09214, section 3.1); unlike in the paper of ICCV 2019, the quality is on the box tower."""

    def __init__(
        self,
        *,
        channels: int,
        num_levels: int,
        num_classes: int,
        num_share_convs: int = 0,
        num_cls_convs: int = 4,
        num_box_convs: int = 4,
        norm: str = "GN",
        deformable: bool = False,
        use_scale: bool = True,
        prior_prob: float = 0.01,
    ):
        """
        Args:
            channels: of all levels.
            num_classes: foreground classes.
            num_share_convs, num_cls_convs, num_box_convs: of both towers together, and of each.
            norm: one of NORMS; batch norms are one per level.
            deformable: the last convolution of each tower is.
            use_scale: a trained factor per level of the box prediction.
            prior_prob: of a class at the start.

        Raises:
            ValueError: unknown norm, or one that does not fit the channels.
        """
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"MODEL.FCOS.NORM is '{norm}'; expected one of {list(NORMS)}")
        if norm in _GROUP_NORMS and channels % _GROUPS:
            raise ValueError(
                f"MODEL.FCOS.NORM is '{norm}', with {_GROUPS} groups, but the levels have {channels} "
                "channels; expected a multiple (MODEL.FPN.OUT_CHANNELS, MODEL.BiFPN.OUT_CHANNELS), or "
                "another norm"
            )

        def tower(count: int, deformable: bool) -> Tower:
            kinds = [False] * (count - 1) + [deformable] if count else []
            blocks = [_block(channels, num_levels, norm, kind) for kind in kinds]
            return Tower(*(layer for block in blocks for layer in block))

        self.share_tower = tower(num_share_convs, False)
        self.cls_tower = tower(num_cls_convs, deformable)
        self.bbox_tower = tower(num_box_convs, deformable)
        self.cls_logits = nn.Conv2d(channels, num_classes, kernel_size=3, padding=1)
        self.bbox_pred = nn.Conv2d(channels, 4, kernel_size=3, padding=1)
        self.ctrness = nn.Conv2d(channels, 1, kernel_size=3, padding=1)
        self.scales = nn.ModuleList(Scale() for _ in range(num_levels)) if use_scale else None
        self.num_levels = num_levels
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d) and not isinstance(layer, DeformConv2d):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)
        nn.init.constant_(self.cls_logits.bias, -math.log((1 - prior_prob) / prior_prob))

    def forward(
        self, features: Sequence[torch.Tensor], box_modules: Sequence[nn.Module] = ()
    ) -> tuple[Levels, ...]:
        """
        Args:
            features: levels (N, C, H, W), from fine to coarse.
            box_modules: to be applied to the box tower's outputs as well.

        Returns:
            per level class logits (N, K, H, W), distances (N, 4, H, W) left, top, right, bottom from the
            location in strides, quality logits (N, 1, H, W), and an output of each of ``box_modules``.
        """
        outputs = [self._level(x, level, box_modules) for level, x in enumerate(features)]
        return tuple(map(list, zip(*outputs)))

    def _level(
        self, x: torch.Tensor, level: int, box_modules: Sequence[nn.Module]
    ) -> tuple[torch.Tensor, ...]:
        x = self.share_tower(x, level)
        logits = self.cls_logits(self.cls_tower(x, level))
        box = self.bbox_tower(x, level)
        distances = self.bbox_pred(box)
        if self.scales is not None:
            distances = self.scales[level](distances)
        others = (module(box) for module in box_modules)
        return (logits, F.relu(distances), self.ctrness(box), *others)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # The name in checkpoints of 2019.
        for leaf in ("weight", "bias"):
            old = f"{prefix}centerness.{leaf}"
            if old in state_dict:
                state_dict[f"{prefix}ctrness.{leaf}"] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _block(channels: int, num_levels: int, norm: str, deformable: bool) -> list[nn.Module]:
    conv = DFConv2d(channels, channels) if deformable else nn.Conv2d(channels, channels, 3, padding=1)
    if norm == "none":
        return [conv, nn.ReLU()]
    return [conv, _norm(channels, num_levels, norm), nn.ReLU()]


def _norm(channels: int, num_levels: int, norm: str) -> nn.Module:
    if norm in _GROUP_NORMS:  # the same numbers
        return nn.GroupNorm(_GROUPS, channels)
    kind = nn.BatchNorm2d if norm == "BN" else nn.SyncBatchNorm
    return LevelNorms(kind(channels) for _ in range(num_levels))
