"""Released checkpoints of AdelaiDet's FCOS and CondInst, and of detectron2's own FCOS, as checkpoints of
projects/FCOS and projects/CondInst; the last also the other way.

Those of 2020 and later need no conversion: MODEL.WEIGHTS, and a teacher's weights, may be their path or
address. The converter checks that a file is complete, and updates older ones: those of the FCOS that
preceded detectron2, and those with "centerness".
"""

from __future__ import annotations

import argparse

from detectron2.config import CfgNode

from ..projects.fcos.names import (
    DROPPED,
    from_detectron2,
    from_public,
    is_detectron2s,
    to_detectron2,
)
from .conversion import Weights, convert_detector, print_result

AUTHOR = "converted from AdelaiDet by distill_d2"


def run(args: argparse.Namespace) -> None:
    """Convert a file, as ``distill-d2 convert adet`` was told.

    Raises:
        ConversionError, KeyError, OSError, ValueError: nothing was written; the message says why.
    """
    finish, use = dict, "MODEL.WEIGHTS"
    if args.to == "detectron2":
        finish, use = to_detectron2, "detectron2's own FCOS: train.init_checkpoint"
    weights, dropped = convert_detector(
        args, AUTHOR, lambda state, cfg: convert(state, cfg, args.backbone), finish
    )
    reasons = {f"{name}*": reason for name, reason in DROPPED.items()}
    print_result(args, weights, dropped, reasons, use=use)


def convert(state_dict: Weights, cfg: CfgNode, backbone: bool) -> tuple[Weights, list[str]]:
    """The weights by their names here, and the names that were dropped."""
    if is_detectron2s(state_dict):
        fcos = cfg.MODEL.FCOS
        state_dict = from_detectron2(state_dict, len(fcos.IN_FEATURES) if fcos.USE_SCALE else 0)
    weights, dropped = from_public(state_dict)
    others = [name for name in weights if backbone and not name.startswith("backbone.")]
    return {k: v for k, v in weights.items() if k not in others}, dropped + others
