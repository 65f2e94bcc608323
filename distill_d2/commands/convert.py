"""Convert a public checkpoint into one of this package.

`distill-d2 convert SOURCE INPUT OUTPUT.pth`, where SOURCE is

  adet          AdelaiDet's FCOS or CondInst, or detectron2's own FCOS
  ssd           amdegroot/ssd.pytorch, qfgaohao/pytorch-ssd or SSD-Knowledge-Distillation
  torchdistill  torchvision's Faster, Mask or Keypoint R-CNN, or GHND's student of one

INPUT is a path or URL: a checkpoint with the entry "model", or a bare state_dict. Code in it is not run, and what
lies beside the weights is not read. Names and shapes must be those of the config's detector, with --backbone
those of its backbone as far as INPUT has it; otherwise nothing is written.

    distill-d2 convert adet FCOS_MS_R_101_2x.pth fcos.pth --config-file FCOS-Detection/MS_R_101_2x.yaml
    distill-d2 convert adet CondInst_MS_R_101_3x.pth condinst.pth --config-file CondInst/MS_R_101_3x.yaml
    # for detectron2's own FCOS, which has no scales per level: only if they are equal
    distill-d2 convert adet fcos_without_scales.pth fcos_d2.pth --to detectron2 \\
        --config-file FCOS-Detection/R_50_1x.yaml MODEL.FCOS.USE_SCALE False
    # DLA-34's weights of ImageNet
    distill-d2 convert adet dla34-ba72cf86.pth dla34.pth --backbone \\
        --config-file FCOS-Detection/FCOS_RT/MS_DLA_34_4x_syncbn.yaml
    distill-d2 convert ssd ssd300_mAP_77.43_v2.pth ssd300.pth --config-file Base-SSD300-VGG16.yaml
    # the original SSD300 as a start for a teacher with other prior boxes
    distill-d2 convert ssd ssd300_mAP_77.43_v2.pth start.pth --config-file Base-SSD-VGG16-teacher.yaml --backbone
    distill-d2 convert torchdistill fasterrcnn_resnet50_fpn_coco-258fb6c6.pth faster.pth

AdelaiDet's checkpoints of 2020 and later need no conversion: MODEL.WEIGHTS, and a teacher's weights, may be their
path or address. The converter checks that a file is complete, and updates older ones.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

from ..pairs import pairs_of

SOURCES = ("adet", "ssd", "torchdistill")
# Options that not all sources have, and their defaults.
OPTIONS: dict[str, dict[str, Any]] = {
    "adet": {"config_file": None, "backbone": False, "to": "projects"},
    "ssd": {"config_file": None, "backbone": False},
    "torchdistill": {"config_file": None, "frozen_bn_eps": 0.0},
}
INTERMIXED = True  # options may stand between INPUT, OUTPUT and KEY VALUE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", choices=SOURCES, help=", ".join(SOURCES))
    parser.add_argument("input", metavar="INPUT", help="path or URL of the weights")
    parser.add_argument("output", metavar="OUTPUT.pth", help="an older file of that name is replaced")
    parser.add_argument(
        "opts", nargs="*", default=[], metavar="KEY VALUE", help="config keys of the detector"
    )
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        help="path of the detector's config, or the name of a packaged one (torchdistill: default by its kind)",
    )
    parser.add_argument(
        "--backbone",
        action="store_const",
        const=True,
        help="adet: leave out all but the backbone; ssd: the heads, and layers that the config lacks",
    )
    parser.add_argument(
        "--to",
        choices=("projects", "detectron2"),
        help="adet: names of projects/FCOS and CondInst (default), or of detectron2's own FCOS",
    )
    parser.add_argument(
        "--frozen-bn-eps",
        type=float,
        metavar="EPS",
        help="torchdistill: eps of the frozen batch norms in INPUT (default: 0). 0 is that of torchvision's "
        "COCO_V1 detectors and of the checkpoints released in 2020. 1e-5, detectron2's own, is that of models "
        "trained from an ImageNet backbone by today's torchvision without setting it to 0, such as "
        "the current torch.hub students of GHND",
    )


def run(args: argparse.Namespace) -> None:
    complete(args)
    from ..convert.conversion import check_paths

    check_paths(args.input, args.output)
    args.opts = pairs_of(args.opts)
    importlib.import_module(f"..convert.{args.source}", __package__).run(args)


def complete(args: argparse.Namespace) -> None:
    """Fill in the defaults of the source's options, in place.

    Raises:
        ValueError: an option is given that it does not have, or --config-file is missing.
    """
    own = OPTIONS[args.source]
    for name in sorted({name for options in OPTIONS.values() for name in options}):
        option = f"--{name.replace('_', '-')}"
        if getattr(args, name) is None:
            setattr(args, name, own.get(name))
        elif name not in own:
            sources = [source for source, options in OPTIONS.items() if name in options]
            raise ValueError(f"{option} is an option of {' and '.join(sources)}, not of {args.source}")
    if args.config_file is None and args.source != "torchdistill":
        raise ValueError(
            f"{args.source} needs --config-file, the config of the detector that INPUT is for"
        )
