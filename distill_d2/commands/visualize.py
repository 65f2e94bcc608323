"""Draw what a distillation loss looks at.

For a few images of DATASETS.TEST, beside the ground truth:

    defeat  DeFeat's masks of objects, and the distance from the teacher, on each level of the neck
    fgfi    the same of FGFI, whose masks are cells with an anchor near an object
    gid     the selected general instances with their scores, by kind
    icd     the decoder's attention to each of the largest instances, on each level
    mimic   FeatureMimic's distance on each level
    pkd     PKD's: the squared difference of the standardized maps on each level

After `distill-d2 demo`:

    distill-d2 visualize --config-file quickstart/shapes_distill.yaml --method pkd --output output/pictures \\
        MODEL.WEIGHTS output/demo/pkd/model_final.pth \\
        MODEL.DISTILLER.TEACHER_WEIGHTS output/demo/teacher/model_final.pth

The method replaces MODEL.DISTILLER.TYPES; its settings are the config's. MODEL.WEIGHTS is a checkpoint of the
student; parameters of the loss (ICD's decoder, adapters) come from the same file, or, where it has none, from
MODEL.DISTILLER.PRELOAD_TEACHER. Each image is a batch of its own, with the size of the evaluation and without
augmentation. One file per image: OUTPUT/<image>_<method>.png; with --overwrite it may replace an older one.
Configs are yaml: LazyConfigs, and so detectron2's FCOS, cannot be drawn yet.
"""

from __future__ import annotations

import argparse

from .arguments import add_config_arguments, add_device_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument(
        "--method", metavar="NAME", required=True, help="defeat, fgfi, gid, icd, mimic or pkd"
    )
    parser.add_argument("--output", metavar="FOLDER", required=True, help="for the pictures")
    parser.add_argument("--overwrite", action="store_true", help="replace pictures of the same names")
    add_device_argument(parser)
    parser.add_argument(
        "--images",
        metavar="N",
        type=int,
        default=4,
        help="how many, spread over DATASETS.TEST (default: 4)",
    )


def run(args: argparse.Namespace) -> None:
    from ..visualize.job import visualize

    visualize(args)
