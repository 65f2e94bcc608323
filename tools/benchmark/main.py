"""What distillation costs: time and memory of its parts, measured in turn in one process.

    tools/benchmark.py --config-file Distillation-PKD/retinanet_R_50_R101_pkd_FPN_1x.yaml \\
        --size 512 --threads 1 [KEY VALUE ...]

Works on generated images and random weights (a teacher's with MODEL.DISTILLER.TEACHER_WEIGHTS), with
learning rate 0, so that every round does the same work. Each round runs, after one round of warm-up:

    student step             forward, backward and optimizer of the student alone; in pure distillation of
                             features (TASK_LOSS_WEIGHT 0) only of the part that the losses read, with
                             a loss that costs next to nothing
    teacher part, plain      the part of the teacher that the losses use, as detectron2 built it
    distilled step           forward, backward and all optimizers of the Distiller
    teacher part, prepared   the part as the Distiller runs it
    teacher whole, plain     the whole prediction
    <loss> alone             forward and backward of one loss on recorded features, and the update of
                             its parameters where it has an optimizer of its own
    <loss> part: ...         forward and backward of its parts, where PARTS names any; GID's selection,
                             which has no backward, also on generated predictions for about 5, 20
                             and 80 thousand anchors: at a linear cost each ratio of two is 4, or
                             less where a fixed cost counts

The headline is the ratio distilled step / (student step + teacher part, plain), taken in each round.
Beside "<loss> alone" runs "<loss> alone, naive formula", and time and peak memory of the two are
compared: always for PKD, whose formula takes a few lines; with --against-naive also where it is slower
(naive.py): DeFeat, GID of RetinaNets, and InstanceConditionalDistillation (about twice the time of the
loss), whose naive version is in tests/, which only a checkout has.
On a CPU ratios are of process time, which other work on the machine disturbs least; on a GPU they
are of the time between two events of its stream.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from detectron2.utils.events import EventStorage

import distill_d2  # noqa: F401  first: it silences known warnings of detectron2
from distill_d2.engine import load_config
from distill_d2.engine.setup import choose_device
from distill_d2.imports import add_import_argument, import_modules
from distill_d2.mistakes import add_debug_argument, ending_on_mistakes

from .meter import Meter, Sample
from .report import facts, print_report, summarize
from .rows import Tasks, build_tasks, compared_rows
from .subjects import build_subjects


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the program; returns what --json writes.

    Raises:
        SystemExit: with status 2, where something given is wrong; one message was printed.
    """
    args = parse_arguments(arguments)
    with ending_on_mistakes("benchmark: ", debug=args.debug):
        report = measure(args)
    print_report(report)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    return report


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Build what ``args`` of ``parse_arguments`` say, and run all rounds; see ``summarize``.

    Raises:
        ImportError, KeyError, OSError, TypeError, ValueError: an argument, the config or a file is wrong.
    """
    logging.getLogger("distill_d2").setLevel(logging.ERROR)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if args.config_file.endswith(".py"):
        raise ValueError(f"--config-file {args.config_file}: only yaml configs can be measured")
    import_modules(args.imports)
    cfg = load_config(args.config_file, args.opts)
    cfg.MODEL.DEVICE = args.device or choose_device(cfg.MODEL.DEVICE, num_gpus=0)
    subjects = build_subjects(cfg, args.size, args.batch, args.objects, args.seed)
    with EventStorage(subjects.iteration):
        tasks = build_tasks(subjects, args.against_naive)
        meter = Meter(torch.device(cfg.MODEL.DEVICE))
        rounds = run_rounds(tasks, meter, args.rounds, args.warmup)
        memory = {name: meter.peak_memory(run) for name, run in tasks.items()}
    report = summarize(rounds, memory, meter.clock, compared_rows(tasks))
    if not meter.per_row:
        report["memory_ratios"] = {}
    report["facts"] = facts(args, cfg, meter)
    return report


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="path or packaged name (yaml)")
    add_import_argument(parser)
    add_debug_argument(parser)
    parser.add_argument("--size", default="512", help="of the images in pixels: 512, or HEIGHTxWIDTH")
    parser.add_argument("--batch", type=int, default=2, help="images per step")
    parser.add_argument("--objects", type=int, default=8, help="objects per image")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="rounds that are not counted")
    parser.add_argument("--device", default="", help="default: MODEL.DEVICE, or cpu without a GPU")
    parser.add_argument("--threads", type=int, default=0, help="of torch on the CPU; 0: as it chooses")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--against-naive", action="store_true", help="time the slow naive versions of losses too"
    )
    parser.add_argument("--json", default="", help="also write the measurements of every round here")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config")
    args = parser.parse_args(arguments)
    sides = args.size.lower().split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        parser.error(f"--size {args.size}: expected a number of pixels, or HEIGHTxWIDTH")
    for name in ("batch", "rounds", "warmup"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected at least 1")
    args.size = (int(sides[0]), int(sides[-1]))
    return args


def run_rounds(tasks: Tasks, meter: Meter, rounds: int, warmup: int) -> dict[str, list[Sample]]:
    """Samples by task, one of each round. Every other round runs backwards, so that no task always
    follows the same one, in the memory and caches that it leaves."""
    samples: dict[str, list[Sample]] = {name: [] for name in tasks}
    for index in range(-warmup, rounds):
        order = list(tasks) if index % 2 == 0 else list(reversed(tasks))
        taken = {name: meter.time(tasks[name]) for name in order}
        if index < 0:
            continue
        for name, sample in taken.items():
            samples[name].append(sample)
        print(f"round {index + 1} of {rounds}", file=sys.stderr, flush=True)
    return samples
