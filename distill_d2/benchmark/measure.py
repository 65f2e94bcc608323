"""The order of the work of ``distill-d2 benchmark``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from detectron2.utils.events import EventStorage

from ..commands.arguments import chosen_device, height_and_width
from ..engine import load_config
from ..imports import import_modules
from .meter import Meter, Sample
from .report import facts, print_report, summarize
from .rows import Tasks, build_tasks, compared_rows
from .subjects import build_subjects


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, and print the report.

    Returns:
        the report, which --json writes.

    Raises: see ``measure``.
    """
    report = measure(args)
    print_report(report)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    return report


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Build what ``args`` of ``distill-d2 benchmark`` say, and run all rounds; see ``summarize``.

    Raises:
        ImportError, KeyError, OSError, TypeError, ValueError: an argument, the config or a file is wrong.
    """
    size = check_arguments(args)
    logging.getLogger("distill_d2").setLevel(logging.ERROR)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if args.config_file.endswith(".py"):
        raise ValueError(f"--config-file {args.config_file}: only yaml configs can be measured")
    import_modules(args.imports)
    cfg = load_config(args.config_file, args.opts)
    cfg.MODEL.DEVICE = chosen_device(args)
    subjects = build_subjects(cfg, size, args.batch, args.objects, args.seed)
    with EventStorage(subjects.iteration):
        tasks = build_tasks(subjects, args.against_naive)
        meter = Meter(torch.device(cfg.MODEL.DEVICE))
        rounds = run_rounds(tasks, meter, args.rounds, args.warmup)
        memory = {name: meter.peak_memory(run) for name, run in tasks.items()}
    report = summarize(rounds, memory, meter.clock, compared_rows(tasks))
    if not meter.per_row:
        report["memory_ratios"] = {}
    report["facts"] = facts(args, size, cfg, meter)
    return report


def check_arguments(args: argparse.Namespace) -> tuple[int, int]:
    """Height and width of the images.

    Raises:
        ValueError: an argument is wrong.
    """
    if args.threads < 0:
        raise ValueError(f"--threads {args.threads}: expected 1 or more, or 0")
    for name in ("batch", "rounds", "warmup"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: expected at least 1")
    return height_and_width(args.size)


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
