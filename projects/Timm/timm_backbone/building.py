"""Build a backbone of timm, alone or below a pyramid, from a config."""

from __future__ import annotations

import re
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from distill_d2.plugins import register_if_free
from distill_d2.rules import Context, Levels, model_rules

from .backbone import STAGES, TimmBackbone
from .simple_pyramid import SimplePyramid
from .vit import TimmViT, has_one_stride

_LEVELS = {"none": 0, "maxpool": 1, "p6p7": 2}


@register_if_free(BACKBONE_REGISTRY)
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone | TimmViT | SimplePyramid:
    """MODEL.TIMM.NAME, which returns the stages MODEL.TIMM.OUT_FEATURES. Of a ViT its map alone, or levels
    of a simple pyramid, of MODEL.FPN.OUT_CHANNELS channels.

    Raises:
        ImportError, ValueError: see ``TimmBackbone``, ``TimmViT`` and ``SimplePyramid``.
    """
    stages = list(cfg.MODEL.TIMM.OUT_FEATURES)
    if not _is_vit(cfg, input_shape):
        return _backbone(cfg, input_shape, stages)
    vit = _vit(cfg, input_shape)
    return vit if stages == [vit.stage] else _simple_pyramid(cfg, vit, stages, prefix="res")


@register_if_free(BACKBONE_REGISTRY)
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN | SimplePyramid:
    """The pyramid of MODEL.FPN on MODEL.TIMM.NAME, with MODEL.TIMM.TOP_BLOCK above it; on a ViT ViTDet's simple
    pyramid.

    Returns:
        levels "p2".. of strides 4, 8, ..; each (N, MODEL.FPN.OUT_CHANNELS, H / stride, W / stride).

    Raises:
        ImportError, ValueError: see ``TimmBackbone``, ``TimmViT`` and ``SimplePyramid``; the keys do not fit
            together.
    """
    names = _in_features(cfg)
    top_block = _top_block(cfg, _level(names[-1]))
    if _is_vit(cfg, input_shape):
        return _simple_pyramid(cfg, _vit(cfg, input_shape), names, top_block=top_block)
    return FPN(
        bottom_up=_backbone(cfg, input_shape, list(cfg.MODEL.TIMM.OUT_FEATURES) or names),
        in_features=names,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _backbone(cfg: CfgNode, input_shape: ShapeSpec, stages: list[str]) -> TimmBackbone:
    return TimmBackbone(out_features=stages, **_arguments(cfg, input_shape))


def _is_vit(cfg: CfgNode, input_shape: ShapeSpec) -> bool:
    node = cfg.MODEL.TIMM
    return has_one_stride(node.NAME, {"in_chans": input_shape.channels, **node.ARGS})


def _vit(cfg: CfgNode, input_shape: ShapeSpec) -> TimmViT:
    return TimmViT(**_arguments(cfg, input_shape))


def _arguments(cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
    node = cfg.MODEL.TIMM
    return {
        "name": node.NAME,
        "weights": node.WEIGHTS,
        "norm": node.NORM,
        "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
        "in_channels": input_shape.channels,
        "args": node.ARGS,
    }


def _simple_pyramid(cfg: CfgNode, vit: TimmViT, stages: list[str], **arguments: Any) -> SimplePyramid:
    return SimplePyramid(vit, stages, cfg.MODEL.FPN.OUT_CHANNELS, norm=cfg.MODEL.FPN.NORM, **arguments)


def _in_features(cfg: CfgNode) -> list[str]:
    names, returned = list(cfg.MODEL.FPN.IN_FEATURES), list(cfg.MODEL.TIMM.OUT_FEATURES)
    stages = list(STAGES)
    start = stages.index(names[0]) if names and names[0] in stages else 0
    if not names or names != stages[start : start + len(names)]:
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES is {names}; expected stages of a timm backbone without a gap, such as "
            f"{stages[1:]}, of {stages}"
        )
    if returned and not set(names) <= set(returned):
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES is {names}, but MODEL.TIMM.OUT_FEATURES is {returned}; expected "
            "all of them there, or []"
        )
    return names


def _level(stage: str) -> int:
    """5 of "res5" and "p5"."""
    return int(re.sub(r"\D", "", stage))


def _top_block(cfg: CfgNode, last: int) -> nn.Module | None:
    """What makes the levels above p``last``. They come from the last level, not from the last stage, so that those
    of a student and of a teacher with another backbone have the same shapes."""
    kind = cfg.MODEL.TIMM.TOP_BLOCK
    more = _read_levels(cfg) - last if kind == "auto" else _LEVELS[kind]
    if more > 2:
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES ends at res{last}, but the detector reads p{last + more}; "
            "MODEL.TIMM.TOP_BLOCK adds at most two levels"
        )
    if more <= 0:
        return None
    if more == 2:
        channels = cfg.MODEL.FPN.OUT_CHANNELS
        return LastLevelP6P7(channels, channels, in_feature=f"p{last}")
    block = LastLevelMaxPool()
    block.in_feature = f"p{last}"
    return block


def _read_levels(cfg: CfgNode) -> int:
    """The number of the highest level that the detector reads, by its keys of levels; 0: it has none."""
    context = Context(cfg)
    keys = [key for key, rule in model_rules(context).items() if isinstance(rule, Levels)]
    names = [name for key in keys for name in context.value(key)]
    return max((_level(name) for name in names if re.fullmatch(r"p\d+", name)), default=0)
