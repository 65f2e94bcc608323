"""GHND's bottleneck: its keys, and what distill_d2 needs to know about it."""

from __future__ import annotations

from detectron2.config import CfgNode as CN

from distill_d2.plugins import Detector, register_detector
from distill_d2.rules import COUNT, Choice, Rule, Sequence, Text


def add_bottleneck_config(cfg: CN) -> None:
    """Add MODEL.BOTTLENECK, in place."""
    cfg.MODEL.BOTTLENECK = node = CN()
    # Builds the backbone that gets the bottleneck, with its own keys (MODEL.RESNETS, MODEL.FPN, ...).
    node.BACKBONE = "build_resnet_fpn_backbone"
    # Channels of the tensor that a device sends.
    node.CHANNELS = 3
    # Channels inside: after the encoder's first three convolutions, the decoder's first two.
    node.ENCODER_WIDTHS = [64, 256, 64]
    node.DECODER_WIDTHS = [64, 128]
    # In evaluation, round what is sent to 8 or 16 bits per number; 0: float32.
    node.QUANT_BITS = 0
    # 8 bits as the reference implementation has them, see ghnd/quantizer.py.
    node.REFERENCE_BUGS = False


RULES: dict[str, Rule] = {
    "MODEL.BOTTLENECK.BACKBONE": Text(empty=False),
    "MODEL.BOTTLENECK.CHANNELS": COUNT,
    "MODEL.BOTTLENECK.ENCODER_WIDTHS": Sequence(COUNT, count=(3,)),
    "MODEL.BOTTLENECK.DECODER_WIDTHS": Sequence(COUNT, count=(2,)),
    "MODEL.BOTTLENECK.QUANT_BITS": Choice((0, 8, 16)),
}

register_detector(
    Detector(
        "Bottleneck",
        add_config=add_bottleneck_config,
        rules=RULES,
        modules=("distill_d2.projects.ghnd",),
        registers=("build_bottleneck_backbone",),
    )
)
