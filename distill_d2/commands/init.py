"""Look at a folder of data and write configs for a teacher, a student and its distillation.

The folder holds images with VOC's xml files, COCO's json files or YOLO's text files, split or not. The configs fit
its classes, images and boxes, and run as they are; the commands that run them are printed.

    distill-d2 init data/raccoons
    distill-d2 init data/cards --output cards --epochs 50
"""

from __future__ import annotations

import argparse

from ..init import check_data_folder
from .arguments import add_device_argument, chosen_device

_FORMATS = ("voc", "coco", "yolo")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA_FOLDER", help="images and their annotations")
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        default="distill",
        help="of the configs and the runs (default: distill)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace configs that are there")
    parser.add_argument(
        "--format", choices=_FORMATS, default="", help="default: the first that is there"
    )
    parser.add_argument(
        "--backbone",
        metavar="NAME",
        default="",
        help="of the student: small, lite0 (pretrained, for a CPU), resnet18 or resnet50; default: resnet50 "
        "with a GPU and pretrained weights, else small",
    )
    parser.add_argument(
        "--epochs",
        metavar="NUMBER",
        type=float,
        default=0.0,
        help="passes over the training images (default: by their number)",
    )
    parser.add_argument(
        "--skip-unreadable",
        action="store_true",
        help="leave out images that cannot be read: DATASETS.SKIP_UNREADABLE of the configs",
    )
    add_device_argument(parser)


def run(args: argparse.Namespace) -> None:
    check_data_folder(args.data)
    device = chosen_device(args)
    from ..init.proposing import propose

    text = propose(
        args.data,
        args.output,
        device=device,
        kind=args.format,
        backbone=args.backbone,
        epochs=args.epochs,
        skip_unreadable=args.skip_unreadable,
        overwrite=args.overwrite,
    )
    print(text)
