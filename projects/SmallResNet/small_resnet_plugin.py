"""SmallResNet: its keys, and what distill_d2 needs to know about it."""

from __future__ import annotations

from detectron2.config import CfgNode as CN

from distill_d2.plugins import Detector, register_detector
from distill_d2.rules import COUNT, NORM, Choice, Rule, Sequence


def add_small_resnet_config(cfg: CN) -> None:
    """Add MODEL.SMALL_RESNET, in place."""
    cfg.MODEL.SMALL_RESNET = node = CN()
    # Channels of the stem (7x7 convolution and max pooling, stride 4) and of each stage; no stage may
    # have as many as the one before it, since detectron2's block then has no strided shortcut.
    node.STEM_WIDTH = 16
    node.WIDTHS = [16, 32, 64, 128]
    # Basic blocks (two 3x3 convolutions) per stage; stages have strides 4, 8, 16 and 32.
    node.BLOCKS = [1, 1, 1, 1]
    # Stages that the FPN reads: ["res2", "res3", "res4"] makes levels p2, p3 and p4.
    node.OUT_FEATURES = ["res2", "res3", "res4"]
    # Add one max-pooled level on top of p5 (needs res5), as Faster R-CNN's p6.
    node.TOP_BLOCK = False
    # Normalization of stem and blocks: "BN", "GN" (widths divisible by 32), "FrozenBN", "SyncBN".
    node.NORM = "BN"


_STAGES = Choice(("res2", "res3", "res4", "res5"))

RULES: dict[str, Rule] = {
    "MODEL.SMALL_RESNET.STEM_WIDTH": COUNT,
    "MODEL.SMALL_RESNET.WIDTHS": Sequence(COUNT, count=(4,)),
    "MODEL.SMALL_RESNET.BLOCKS": Sequence(COUNT, count=(4,)),
    "MODEL.SMALL_RESNET.OUT_FEATURES": Sequence(_STAGES, least=1, unique=True),
    "MODEL.SMALL_RESNET.NORM": NORM,
}

register_detector(
    Detector(
        "SmallResNet",
        add_config=add_small_resnet_config,
        rules=RULES,
        modules=("distill_d2.projects.small_resnet",),
        registers=("build_small_resnet_backbone",),
    )
)
