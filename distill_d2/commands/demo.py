"""Teach a student on generated data, and print what it gained.

Trains a teacher, then a student alone and the same student distilled, side by side, and prints them. Takes minutes
on two CPU cores. Everything it runs is an ordinary command line, printed first; each run's log, checkpoints and
metrics are in OUTPUT/teacher, OUTPUT/student and OUTPUT/<method>.

    distill-d2 demo
    distill-d2 demo --methods pkd mimic icd gid --seed 2 --output output/demo2

The methods gid-feature, gid-relation and gid-response are single parts of GID, defeat-neck is DeFeat without the
head's classes; bccd_rcnn is BCCD with Faster R-CNN, shapes_ssd and bccd_ssd are SSD (methods ssdkd and
ssdkd-repository), bccd_fcos and nuclei_solov2 FCOS and SOLOv2 (icd), the others have RetinaNet.
"""

from __future__ import annotations

import argparse

from ..demo import DATASETS, METHODS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        choices=DATASETS,
        default="shapes",
        help=f"{', '.join(DATASETS)} (default: shapes)",
    )
    parser.add_argument(
        "--methods",
        metavar="NAME",
        nargs="+",
        choices=METHODS,
        default=["pkd"],
        help=f"{', '.join(METHODS)} (default: pkd)",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=1, help="of all runs (default: 1)")
    parser.add_argument(
        "--output", metavar="FOLDER", default="output/demo", help="for the runs (default: output/demo)"
    )
    parser.add_argument(
        "--num-gpus",
        metavar="N",
        type=int,
        default=0,
        help="GPUs of this machine; 0: on the CPU (default: 0)",
    )
    parser.add_argument("opts", metavar="KEY VALUE", nargs=argparse.REMAINDER, help="for all runs")


def run(args: argparse.Namespace) -> None:
    from ..demo import demo

    demo(args)
