"""How large and how fast are student and teacher?

Parameters, multiply-adds, weights on disk, memory and time per image, of whole detectors and of backbone, neck
and head, measured in turn in one process. A distillation, its OUTPUT_DIR or its config, gives its teacher and
its student. It says in words when the student is hardly faster, and which part takes its time.

    distill-d2 profile --run output/pkd
    distill-d2 profile --run output/teacher --run output/pkd --images photos/ --json profile.json
    distill-d2 profile --config-file Distillation-PKD/retinanet_R_50_R101_pkd_FPN_1x.yaml --size 800x1088

Detectors of --config-file have random weights, which find other objects than trained ones: what comes after the
network, such as non-maximum suppression, takes another time.
"""

from __future__ import annotations

import argparse

from ..imports import add_import_argument
from ..run_files import check_run
from .arguments import OPTS_HELP, add_device_argument, add_run_argument, height_and_width


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_argument(parser, dest="runs", action="append", default=[])
    parser.add_argument(
        "--config-file",
        dest="config_files",
        metavar="FILE",
        action="append",
        default=[],
        help="path of a config, or the name of a packaged one; repeatable",
    )
    parser.add_argument(
        "--size",
        metavar="HxW",
        default="",
        help="of the images in pixels; default: as the first is evaluated",
    )
    parser.add_argument(
        "--images",
        metavar="IMAGES",
        action="append",
        default=[],
        help="a file, folder or pattern, of which at most 8 are taken; repeatable; default: a generated image",
    )
    parser.add_argument(
        "--seconds",
        metavar="NUMBER",
        type=float,
        default=10.0,
        help="how long to measure times (default: 10)",
    )
    parser.add_argument(
        "--threads",
        metavar="N",
        type=int,
        default=1,
        help="of torch on a CPU; 0: as it chooses (default: 1)",
    )
    parser.add_argument(
        "--no-onnx",
        dest="onnx",
        action="store_false",
        help="do not measure in onnxruntime, where it is installed",
    )
    parser.add_argument("--json", metavar="FILE", help="write all numbers here, too")
    add_import_argument(parser)
    add_device_argument(parser)
    parser.add_argument("opts", metavar="KEY VALUE", nargs=argparse.REMAINDER, help=OPTS_HELP)


def run(args: argparse.Namespace) -> None:
    if not args.runs and not args.config_files:
        raise ValueError("nothing to measure; give --run (an OUTPUT_DIR) or --config-file")
    size = height_and_width(args.size) if args.size else None
    if args.threads < 0:
        raise ValueError(f"--threads {args.threads}: expected 1 or more, or 0")
    if not args.seconds > 0:
        raise ValueError(f"--seconds {args.seconds}: expected more than 0")
    for name in args.runs:
        check_run(name)

    from ..imports import import_modules
    from ..profiling.main import measure, tell
    from .arguments import chosen_device

    import_modules(args.imports)
    device = chosen_device(args)
    report = measure(
        args.runs,
        args.config_files,
        args.opts,
        device,
        size,
        args.images,
        seconds=args.seconds,
        threads=args.threads,
        onnx=args.onnx,
    )
    tell(report)
    if args.json:
        report.write(args.json)
