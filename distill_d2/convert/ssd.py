"""Public checkpoints of SSD (amdegroot/ssd.pytorch, qfgaohao/pytorch-ssd, SSD-Knowledge-Distillation) as
checkpoints of projects/SSD. The background becomes the last class.
"""

from __future__ import annotations

import argparse

from ..projects.ssd.names import DROPPED, from_public
from .conversion import ConversionError, Weights, convert_detector, listing, print_result

AUTHOR = "converted from a public SSD by distill_d2"


def run(args: argparse.Namespace) -> None:
    """Convert a file, as ``distill-d2 convert ssd`` was told.

    Raises:
        ConversionError, KeyError, OSError, ValueError: nothing was written; the message says why.
    """
    weights, dropped = convert_detector(
        args, AUTHOR, lambda state_dict, _cfg: convert(state_dict, args.backbone)
    )
    print_result(args, weights, dropped, DROPPED, ", the background last among the classes")


def convert(state_dict: Weights, backbone: bool) -> tuple[Weights, list[str]]:
    """The weights by their names here, and the names that were dropped.

    Raises:
        ConversionError: the meaning of some key is not known.
    """
    weights, dropped, unknown = from_public(state_dict)
    if unknown:
        raise ConversionError(
            f"{len(unknown)} of INPUT's {len(state_dict)} keys do not belong to a known SSD: {listing(unknown)}"
        )
    if backbone:
        heads = [name for name in weights if name.startswith(("head.", "backbone.l2_norm."))]
        dropped += heads
        weights = {name: tensor for name, tensor in weights.items() if name not in heads}
    return weights, dropped
