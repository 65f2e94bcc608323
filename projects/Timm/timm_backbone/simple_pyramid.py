"""The simple feature pyramid of ViTDet, from one map."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid
from torch import nn

from .backbone import STAGES
from .vit import TimmViT


class SimplePyramid(SimpleFeaturePyramid):
    """detectron2's SimpleFeaturePyramid (arXiv:2203.16527, section 3) on a ``TimmViT``, which is its ``bottom_up``
    as in an FPN, with the padding that it needs, with or without a norm."""

    def __init__(
        self,
        bottom_up: TimmViT,
        in_features: Sequence[str],
        out_channels: int,
        norm: str = "LN",
        top_block: nn.Module | None = None,
        prefix: str = "p",
    ):
        """
        Args:
            bottom_up: returns one map.
            in_features: the levels to make of it, by the stages of their strides, without a gap: some of "res2"
                to "res5" of at most 4 times and at least half the resolution of the map.
            out_channels: of each level.
            norm: "LN", or another of detectron2's; "": none.
            top_block: makes further levels, as in an FPN.
            prefix: of the levels' names: "p" for "p2" to "p5", "res" for "res2" to "res5".

        Raises:
            ValueError: levels that cannot be made of the map.
        """
        ((stage, shape),) = bottom_up.output_shape().items()
        possible = [each for each, stride in STAGES.items() if shape.stride / stride in (4, 2, 1, 0.5)]
        if not set(in_features) <= set(possible):
            raise ValueError(
                f"MODEL.FPN.IN_FEATURES (or MODEL.TIMM.OUT_FEATURES) is {list(in_features)}; a simple pyramid on "
                f"MODEL.TIMM.NAME '{bottom_up.name}', whose map has the stride {shape.stride}, makes {possible}"
            )
        factors = [shape.stride / STAGES[each] for each in in_features]
        super().__init__(bottom_up, stage, out_channels, factors, top_block=top_block, norm=norm)
        self.bottom_up = self._modules.pop("net")  # the name that an FPN has for it
        self._size_divisibility = max(self._size_divisibility, shape.stride)
        names = {level: prefix + level[1:] for level in self._out_features}
        self._out_features = list(names.values())
        self._out_feature_strides = {names[k]: v for k, v in self._out_feature_strides.items()}
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)
        for layers in self.stages:
            for key, layer in list(layers._modules.items()):
                if layer is None:  # norm "" between two convolutions
                    layers._modules[key] = nn.Identity()

    @property
    def net(self) -> Backbone:
        return self.bottom_up

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        return {"size_divisibility": self._size_divisibility}
