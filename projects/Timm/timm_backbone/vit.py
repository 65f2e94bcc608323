"""Models of timm whose maps have one stride, such as ViTs, as backbones of detectron2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.modeling.backbone import Backbone
from torch import nn

from .backbone import STAGES, create_model, with_norm
from .weights import load_weights


class TimmViT(Backbone):
    """A model of timm whose blocks all have maps of one stride: ViT, DeiT, DINOv2, DINOv3, EVA, BEiT, ...

    It returns one map, that of the last block after the model's last norm. Patches of 14 pixels, DINOv2's, become
    patches of 16: images are resized to 14/16 of their size, so that a map fits those of other backbones exactly.

    Attributes:
        body: the model of timm, with timm's names.
        stage: the map's name, by its stride: "res4" for patches of 14 and 16 pixels.
        name, weights: see below.
    """

    def __init__(
        self,
        name: str,
        weights: str = "",
        norm: str = "FrozenBN",
        freeze_at: int = 0,
        in_channels: int = 3,
        args: Mapping[str, Any] | None = None,
    ):
        """
        Args:
            name, weights, in_channels, args: as of ``TimmBackbone``.
            norm: of batch norms, which few of these models have.
            freeze_at: parts that are not trained: 1 what comes before the blocks, patch and position embeddings;
                2 also the first quarter of the blocks, 3 half of them, 4 three quarters; 5 everything.

        Raises:
            ImportError: timm is not installed.
            ValueError: timm has no such model, or it has several strides, or another than 4 to 32.
        """
        super().__init__()
        self.name, self.weights = name, weights
        self.body, self._args = _of_any_size(name, {"in_chans": in_channels, **(args or {})})
        _cut(self.body)
        strides = {each["reduction"] for each in self.body.feature_info}
        if len(strides) != 1:
            raise ValueError(
                f"the model of timm '{name}' has stages of the strides {sorted(strides)}; expected one stride. "
                "TimmBackbone is for stages"
            )
        self._patch = strides.pop()
        stride = 2 ** round(math.log2(self._patch))
        names = {each: stage for stage, each in STAGES.items()}
        if stride not in names:
            raise ValueError(
                f"MODEL.TIMM.NAME is '{name}', of patches of {self._patch} pixels; expected about {list(names)}"
            )
        self.stage = names[stride]
        self._out_features = [self.stage]
        self._out_feature_strides = {self.stage: stride}
        self._out_feature_channels = {self.stage: self.body.num_features}
        self.body = with_norm(self.body, norm)
        _freeze(self.body, freeze_at)

    @property
    def size_divisibility(self) -> int:
        return self._out_feature_strides[self.stage]

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            x: (N, C, H, W), normalized images; H and W multiples of the stride.

        Returns:
            {stage: (N, channels, H / stride, W / stride)}.

        Raises:
            ValueError: the images are larger than those of a model that takes one size.
        """
        stride = self._out_feature_strides[self.stage]
        rows, columns = x.shape[-2] // stride, x.shape[-1] // stride
        if self._patch != stride:
            size = (rows * self._patch, columns * self._patch)
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        return {self.stage: _last_map(self.body, self._fill(x))[:, :, :rows, :columns]}

    def _fill(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` with zeros below and to its right, where the model takes one size."""
        own = _own_size(self.body)
        if own is None:
            return x
        (height, width), (own_height, own_width) = x.shape[-2:], own
        if height > own_height or width > own_width:
            raise ValueError(
                f"the model of timm '{self.name}' takes images of {own_height}x{own_width} pixels alone; a padded "
                f"batch has {height}x{width}. Set INPUT.MIN_SIZE_* and MAX_SIZE_*, or MODEL.TIMM.ARGS "
                f"'{{img_size: {max(height, width)}}}'"
            )
        return F.pad(x, (0, own_width - width, 0, own_height - height))

    def load_initial_weights(self) -> None:
        """As ``TimmBackbone.load_initial_weights``."""
        load_weights(self.body, self.name, self.weights, self._args)


def has_one_stride(name: str, args: Mapping[str, Any]) -> bool:
    """Whether all maps of a model of timm have one stride.

    Raises:
        ImportError, ValueError: see ``TimmViT``.
    """
    with torch.device("meta"):
        body: Any = create_model(name, args)
    return len({each["reduction"] for each in body.feature_info}) == 1


def _of_any_size(name: str, args: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A model that takes images of every size, where timm has that, and its arguments."""
    dynamic = {"dynamic_img_size": True, **args}
    try:
        return create_model(name, dynamic), dynamic
    except ValueError:  # not an argument of this model
        return create_model(name, args), dict(args)


def _cut(body: Any) -> None:
    """Remove the classifier, in place; the last norm stays."""
    body.prune_intermediate_layers([len(body.feature_info) - 1], prune_norm=False, prune_head=True)


def _own_size(body: nn.Module) -> tuple[int, int] | None:
    """(H, W) in pixels of the images of a model that takes no others."""
    embeds: Any = (each for each in body.modules() if getattr(each, "strict_img_size", False))
    return next((each.img_size for each in embeds), None)


def _last_map(body: Any, x: torch.Tensor) -> torch.Tensor:
    """(N, channels, H / patch, W / patch)."""
    (last,) = body.forward_intermediates(
        x, indices=[len(body.feature_info) - 1], norm=True, output_fmt="NCHW", intermediates_only=True
    )
    return last


def _freeze(body: Any, freeze_at: int) -> None:
    from timm.utils.model import freeze

    if freeze_at <= 0:
        return
    if freeze_at >= 5:
        freeze(body)
        return
    blocks = [each["module"] for each in body.feature_info]
    parts = [name for name, _ in body.named_children()]
    before = parts[: parts.index(blocks[0].partition(".")[0])]
    freeze(body, before + blocks[: math.ceil(len(blocks) * (freeze_at - 1) / 4)])
    for parameter in body.parameters(recurse=False):  # embeddings of positions, tokens
        parameter.requires_grad_(False)
