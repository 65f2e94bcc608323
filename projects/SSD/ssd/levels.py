"""SSD's levels on any backbone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.modeling.backbone import Backbone
from torch import nn

from .vgg import L2Norm, extra_layers, initialize


class SSDLevels(Backbone):
    """A backbone's stages, normalized, and extra levels of half the size each, named by their strides.

    A stage of stride 16 becomes level s16. Stages of pretrained networks differ in scale, by a factor of ten
    within one network, and heads and extra layers start for inputs of one scale: each position of a stage
    is scaled to a mean square of 1, times a trainable scale per channel, as SSD300 does it with conv4_3.
    The backbone is ``bottom_up``, as in detectron2's FPN.
    """

    def __init__(self, bottom_up: Backbone, strides: Sequence[int], size: int, channels: int):
        """
        Args:
            bottom_up: its stages are levels too where ``strides`` does not name them, for losses on features.
            strides: of the levels that a head reads, rising; those beyond the last stage are extra levels.
            size: of the images in pixels, high and wide.
            channels: of the extra levels.

        Raises:
            ValueError: ``strides`` names a finer level than the last stage that is no stage, leaves out the last
                stage, or names an extra level that halving does not reach.
        """
        super().__init__()
        self.bottom_up = bottom_up
        stages = {f"s{shape.stride}": (name, shape) for name, shape in bottom_up.output_shape().items()}
        last = max(shape.stride for _, shape in stages.values())
        self._stages = {level: name for level, (name, _) in stages.items()}
        self._out_feature_channels = {level: shape.channels or 0 for level, (_, shape) in stages.items()}
        self.norms = nn.ModuleDict(
            {level: L2Norm(c, c**0.5) for level, c in self._out_feature_channels.items()}
        )
        extra = [stride for stride in strides if stride > last]
        _check(strides, list(stages), last, size)
        self._extra = [f"s{stride}" for stride in extra]
        before = self._out_feature_channels[f"s{last}"]
        self.extras = nn.ModuleList(extra_layers(before, [channels] * len(extra), [2] * len(extra)))
        initialize(self.extras)
        self._out_feature_channels.update(dict.fromkeys(self._extra, channels))
        self._out_features = list(self._out_feature_channels)
        self._out_feature_strides = {level: int(level[1:]) for level in self._out_features}

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """From images (N, 3, H, W) to levels by name, from fine to coarse."""
        stages = self.bottom_up(x)
        maps = {level: self.norms[level](stages[name]) for level, name in self._stages.items()}
        x = maps[self._out_features[len(maps) - 1]]
        for level, (reduce, halve) in zip(self._extra, zip(self.extras[::2], self.extras[1::2])):
            x = F.relu_(halve(F.relu_(reduce(x))))
            maps[level] = x
        return maps


def _check(strides: Sequence[int], stages: Sequence[str], last: int, size: int) -> None:
    missing = [f"s{stride}" for stride in strides if stride <= last and f"s{stride}" not in stages]
    if missing or last not in strides:
        raise ValueError(
            f"MODEL.SSD.STRIDES is {list(strides)}, but the stages of the backbone are {list(stages)}; "
            + (f"{missing} are none of them" if missing else f"its last one, s{last}, is not read")
        )
    cells = -(-size // last)
    for stride in (stride for stride in strides if stride > last):
        cells = -(-cells // 2)
        if cells != -(-size // stride):
            raise ValueError(
                f"MODEL.SSD.STRIDES is {list(strides)}: extra levels halve the one before, so that of stride "
                f"{stride} is {cells} cells wide, expected {-(-size // stride)} of an image of {size} pixels; "
                f"{last} is the stride of the backbone's last stage"
            )
