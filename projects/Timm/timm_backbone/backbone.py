"""Any model of timm that returns feature maps, as a backbone of detectron2."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.modeling.backbone import Backbone
from torch import nn

from .freezing import freeze_unread, freeze_until
from .requirement import import_timm
from .weights import load_weights

#: Stages by their strides, named as those of detectron2's ResNet.
STAGES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


class TimmBackbone(Backbone):
    """A model of timm, cut off behind the last stage that is read.

    Its tensors are named as timm names them, below ``body``. A new one has random weights; a training that starts
    without MODEL.WEIGHTS calls ``load_initial_weights``. In a LazyConfig:
    ``model.backbone.bottom_up = L(TimmBackbone)(name="resnet18.a1_in1k", weights="timm")``.

    Attributes:
        body: the model of timm.
        name, weights: see below.
    """

    def __init__(
        self,
        name: str,
        out_features: Sequence[str] = ("res3", "res4", "res5"),
        weights: str = "",
        norm: str = "FrozenBN",
        freeze_at: int = 0,
        in_channels: int = 3,
        args: Mapping[str, Any] | None = None,
    ):
        """
        Args:
            name: of a model of timm, with or without the tag of its weights.
            out_features: the stages to return, some of "res2" to "res5", of strides 4 to 32.
            weights: where ``load_initial_weights`` takes them from: "" (none), "timm", a path or URL, or
                "package:" and the name of an installed package.
            norm: "FrozenBN", "BN" or "SyncBN", of the batch norms; other norms stay as they are.
            freeze_at: parts that are not trained: 1 the stem, 2 also stride 4, 3 stride 8, ...; their batch
                norms are fixed, too.
            in_channels: of the images.
            args: more arguments of ``timm.create_model``.

        Raises:
            ImportError: timm is not installed.
            ValueError: timm has no such model, or the model has no stages of these strides.
        """
        super().__init__()
        self.name, self.weights = name, weights
        self._args = {"in_chans": in_channels, **(args or {})}
        self.body = create_model(name, self._args)
        features = {each["reduction"]: (i, each) for i, each in enumerate(self.body.feature_info)}
        self._out_features = sorted(out_features, key=lambda stage: STAGES.get(stage, 0))
        _check_stages(name, self._out_features, list(features))
        self._out_feature_strides = {stage: STAGES[stage] for stage in self._out_features}
        found = [features[stride] for stride in self._out_feature_strides.values()]
        self._out_feature_channels = {
            stage: feature["num_chs"] for stage, (_, feature) in zip(self._out_features, found)
        }
        self._indices = [index for index, _ in found]
        self.body.prune_intermediate_layers(self._indices, prune_head=True, prune_norm=True)
        self.body = with_norm(self.body, norm)
        freeze_unread(self.body, found[-1][1]["module"])
        if freeze_at > 0:
            last = STAGES[self._out_features[-1]]
            modules = {
                stride: each["module"] for stride, (_, each) in features.items() if stride <= last
            }
            freeze_until(self.body, modules, 2**freeze_at)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            x: (N, C, H, W), normalized images; H and W multiples of the last stride.

        Returns:
            by stage (N, channels, H / stride, W / stride).
        """
        maps = self.body.forward_intermediates(
            x, indices=self._indices, stop_early=True, intermediates_only=True
        )
        return dict(zip(self._out_features, maps))

    def load_initial_weights(self) -> None:
        """Load the weights that ``weights`` names, in place.

        Raises:
            FileNotFoundError, OSError, ValueError: they cannot be found or read, or do not fit; the message names
                them.
        """
        load_weights(self.body, self.name, self.weights, self._args)


def create_model(name: str, args: Mapping[str, Any], pretrained: bool = False) -> nn.Module:
    """``timm.create_model``.

    Raises:
        ImportError: timm is not installed.
        ValueError: timm has no such model, or refuses an argument.
    """
    timm = import_timm()
    plain = name.partition(".")[0]
    if not timm.is_model(plain):
        close = difflib.get_close_matches(plain, timm.list_models(), n=3)
        hint = f"; the closest are {close}" if close else ""
        raise ValueError(
            f"MODEL.TIMM.NAME is '{name}'; expected a model of timm {timm.__version__} (timm.list_models()){hint}"
        )
    try:
        return timm.create_model(name, pretrained=pretrained, **args)
    except (TypeError, RuntimeError, AssertionError) as error:
        if pretrained and not isinstance(error, TypeError):
            raise
        raise ValueError(
            f"MODEL.TIMM: timm cannot create '{name}' with {dict(args)}: {error}"
        ) from error


def _check_stages(name: str, stages: Sequence[str], strides: Sequence[int]) -> None:
    missing = [stage for stage in stages if STAGES.get(stage) not in strides]
    if missing or not stages:
        has = [stage for stage, stride in STAGES.items() if stride in strides]
        raise ValueError(
            f"MODEL.TIMM.OUT_FEATURES (or MODEL.FPN.IN_FEATURES) is {list(stages)}, but MODEL.TIMM.NAME "
            f"'{name}' has the stages {has}, of the strides {list(strides)}"
        )


def with_norm(body: nn.Module, norm: str) -> nn.Module:
    """``body`` with its batch norms converted. detectron2's conversion would drop the activations in timm's."""
    from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d

    if norm == "FrozenBN":
        return freeze_batch_norm_2d(body)
    if norm == "SyncBN":
        return convert_sync_batchnorm(body)
    if norm == "BN":
        return body
    raise ValueError(f"MODEL.TIMM.NORM is '{norm}'; expected FrozenBN, BN or SyncBN")
