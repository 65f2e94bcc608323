"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import Any

from ..config_files import read_config
from ..imports import add_import_argument
from ..model_zoo import find_config
from ..pairs import pairs_of

OPTS_HELP = "keys of the config and their values; KEY=VALUE, too, as a LazyConfig needs it"


def add_config_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add --config-file, --import and the KEY VALUE pairs, which come last: ``args.config_file``,
    ``args.imports``, ``args.opts``."""
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        default="",
        required=required,
        help="path of a config, or the name of a packaged one",
    )
    add_import_argument(parser)
    parser.add_argument("opts", metavar="KEY VALUE", nargs=argparse.REMAINDER, help=OPTS_HELP)


def check_config_arguments(args: argparse.Namespace) -> None:
    """Check --config-file and the KEY VALUE pairs, of a command that has them, as far as this takes no time: torch
    is not imported.

    Raises:
        ValueError: a training has neither; a pair is not complete; the file, or a _BASE_ of it, is not yaml.
        FileNotFoundError, OSError: the file, or a _BASE_ of it, does not exist or cannot be read.
    """
    file, words = getattr(args, "config_file", None), getattr(args, "opts", None)
    if not file and not words and getattr(args, "needs_config", False):
        raise ValueError(
            "--config-file is missing; give the path of a config, or the name of a packaged one such as "
            "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
        )
    path = find_config(file) if file else ""
    if path.endswith(".py"):
        return
    if path:
        read_config(path)
    pairs_of(words or [])


def add_run_argument(parser: argparse.ArgumentParser, **options: Any) -> None:
    """Add --run, with these options of argparse; ``run_files.check_run`` checks it."""
    repeatable = "; repeatable" if options.get("action") == "append" else ""
    parser.add_argument(
        "--run",
        metavar="RUN",
        help=f"a training's OUTPUT_DIR, a config with weights, or an exported file of weights{repeatable}",
        **options,
    )


def height_and_width(text: str) -> tuple[int, int]:
    """The value of --size, such as 480x640, or 480 for both.

    Raises:
        ValueError: it is another text.
    """
    found = re.fullmatch(r"([1-9]\d*)(?:[xX]([1-9]\d*))?", text)
    if found is None:
        raise ValueError(
            f"--size {text}: expected height and width in pixels, such as 480x640, or one number for both"
        )
    return int(found[1]), int(found[2] or found[1])


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Add --device; ``chosen_device`` reads it."""
    parser.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda or cuda:1; default: cuda where torch sees a GPU"
    )


def chosen_device(args: argparse.Namespace) -> str:
    """The device of --device.

    Raises:
        ValueError: torch does not know it, or sees no GPU.
    """
    import torch

    if args.device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        raise ValueError(
            f"--device {args.device}: not a device of torch; expected cpu, cuda or cuda:1"
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {args.device}: torch sees {torch.cuda.device_count()} GPUs; expected cpu"
        )
    return args.device


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add detectron2's arguments, --num-procs for several processes without GPUs, --overwrite and others."""
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        default="",
        help="path of a config, or the name of a packaged one",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the last checkpoint in OUTPUT_DIR, if there is one",
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS, do not train")
    parser.add_argument(
        "--num-gpus",
        metavar="N",
        type=int,
        default=1,
        help="GPUs of this machine; 0: on the CPU (default: 1)",
    )
    parser.add_argument("--num-machines", metavar="N", type=int, default=1, help="default: 1")
    parser.add_argument(
        "--machine-rank",
        metavar="N",
        type=int,
        default=0,
        help="of this machine, from 0; each has another",
    )
    parser.add_argument(
        "--dist-url",
        metavar="URL",
        help="where processes meet, tcp://HOST:PORT; needed by several machines",
    )
    parser.add_argument(
        "--num-procs",
        metavar="N",
        type=int,
        default=1,
        help="processes of this machine with --num-gpus 0 (default: 1)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="remove an earlier run's checkpoints, metrics and results from OUTPUT_DIR",
    )
    add_import_argument(parser)
    parser.add_argument(
        "--detect-anomaly",
        action="store_true",
        help="repeat a step whose loss is not finite, and name the operation; slower on a GPU",
    )
    parser.add_argument(
        "--wandb", action="store_true", help="log to Weights & Biases, too: WANDB.ENABLED True"
    )
    parser.add_argument("opts", metavar="KEY VALUE", nargs=argparse.REMAINDER, help=OPTS_HELP)
    # As detectron2's: fixed per user. For several machines; one machine takes a free port, so that two runs
    # do not collide.
    user = os.getuid() if sys.platform != "win32" else 1
    parser.set_defaults(needs_config=True)
    parser.set_defaults(default_dist_url=f"tcp://127.0.0.1:{2**15 + 2**14 + hash(user) % 2**14}")
