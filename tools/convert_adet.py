#!/usr/bin/env python
"""Convert a released checkpoint of AdelaiDet's FCOS or CondInst, or one of detectron2's own FCOS, into a
detectron2 checkpoint of projects/FCOS or projects/CondInst.

    tools/convert_adet.py FCOS_MS_R_101_2x.pth fcos.pth --config-file FCOS-Detection/MS_R_101_2x.yaml
    tools/convert_adet.py CondInst_MS_R_101_3x.pth condinst.pth --config-file CondInst/MS_R_101_3x.yaml
    # of detectron2's own FCOS (with a head of GN)
    tools/convert_adet.py model_final.pth fcos.pth --config-file FCOS-Detection/R_50_1x.yaml
    # for detectron2's own FCOS, which has no scales per level: only if they are equal
    tools/convert_adet.py fcos_without_scales.pth fcos_d2.pth --to detectron2 \\
        --config-file FCOS-Detection/R_50_1x.yaml MODEL.FCOS.USE_SCALE False
    # DLA-34's weights of ImageNet
    tools/convert_adet.py dla34-ba72cf86.pth dla34.pth --backbone \\
        --config-file FCOS-Detection/FCOS_RT/MS_DLA_34_4x_syncbn.yaml

Those of 2020 and later need no conversion: MODEL.WEIGHTS, and a teacher's weights, may be their path or
address. The converter checks that a file is complete, and updates older ones: those of the FCOS that
preceded detectron2, and those with "centerness".

INPUT is a path or URL: a checkpoint with the entry "model", or a bare state_dict. Code in it is not run,
and other entries (optimizer, ...) are not read. Names and shapes must be those of CONFIG's
detector, with --backbone those of its backbone as far as INPUT has it; otherwise nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence

from conversion import Weights, convert_detector, make_detector_parser, parse_arguments, print_result
from detectron2.config import CfgNode
from distill_d2.projects.fcos.names import (
    DROPPED,
    from_detectron2,
    from_public,
    is_detectron2s,
    to_detectron2,
)

AUTHOR = "converted from AdelaiDet by distill_d2"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; exits with a message if nothing was written."""
    parser = make_detector_parser(__doc__, "leave out all but the backbone")
    parser.add_argument(
        "--to",
        choices=("projects", "detectron2"),
        default="projects",
        help="names of projects/FCOS and CondInst, or of detectron2's own FCOS",
    )
    args = parse_arguments(parser, arguments)
    finish, use = dict, "MODEL.WEIGHTS"
    if args.to == "detectron2":
        finish, use = to_detectron2, "detectron2's own FCOS: train.init_checkpoint"
    weights, dropped = convert_detector(
        "convert_adet", args, AUTHOR, lambda state, cfg: convert(state, cfg, args.backbone), finish
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


if __name__ == "__main__":
    main()
