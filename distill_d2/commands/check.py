"""Tell what is wrong with a training, and what it will do, without training.

Config, datasets, teacher and losses are checked, and all faults are listed. If there are none, some steps are
measured: how strongly each term pulls on the student (logged values mislead), time, memory, and the duration of
the whole run. Nothing is written to OUTPUT_DIR. The exit status is 1 if something is wrong.

    distill-d2 check --config-file my_distill.yaml
    distill-d2 check --config-file my_distill.yaml --write my_balanced.yaml SOLVER.IMS_PER_BATCH 4
    distill-d2 check --config-file my_teacher.yaml --baseline --pictures batch
"""

from __future__ import annotations

import argparse
import math
import os

from .arguments import add_config_arguments, add_device_argument, chosen_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--baseline",
        action="store_true",
        help="check the training of the student alone, without a teacher",
    )
    parser.add_argument(
        "--batches",
        metavar="N",
        type=int,
        default=3,
        help="of four images, on which gradients are measured (default: 3, as a training does)",
    )
    parser.add_argument(
        "--ratio",
        metavar="NUMBER",
        type=float,
        default=1.0,
        help="of a loss's gradient to the task's, for which weights are proposed (default: 1)",
    )
    parser.add_argument(
        "--write", metavar="FILE", default="", help="write a new yaml config with the proposed weights"
    )
    parser.add_argument(
        "--pictures",
        metavar="FOLDER",
        default="",
        help="draw the first batch there, as it is trained on: resized, augmented, with its ground truth",
    )
    add_device_argument(parser)
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.batches < 1:
        raise ValueError(f"--batches {args.batches}: expected at least 1")
    if not 0 < args.ratio < math.inf:
        raise ValueError(f"--ratio {args.ratio}: expected a number above 0")
    if args.write and args.config_file.endswith(".py"):
        raise ValueError(
            "--write works with yaml configs only; for a .py config set the printed weights"
        )
    if args.write and os.path.exists(args.write):
        raise ValueError(f"--write '{args.write}' exists; give another name, or remove it")
    on_gpu = chosen_device(args) != "cpu"
    from ..check import check_run
    from ..engine.output_dir import check_writable

    if args.write:
        check_writable(os.path.dirname(args.write) or ".", "--write")
    vars(args).update(num_gpus=int(on_gpu), resume=False, overwrite=False, eval_only=False, wandb=False)
    return check_run(args)
