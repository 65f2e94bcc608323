"""What train_baseline.py and train_distill.py do in each process."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from detectron2.utils import comm

from .. import plugins
from ..checkpoint import told_when_full
from ..imports import import_modules
from . import lazy
from .evaluate import evaluate
from .notes import note_command
from .output_dir import release, remove_run
from .run_summary import log_end
from .settings import RunSettings
from .setup import setup
from .started_processes import find_place
from .trainer import DistillTrainer


def main(args: argparse.Namespace, distill: bool) -> Any:
    """Train, or with --eval-only evaluate, what the arguments say.

    Args:
        args: of ``argument_parser``.
        distill: with a teacher, or the student alone.

    Returns:
        the results of the evaluation.

    Raises:
        ImportError: a module that --import or an installed package names cannot be imported.
        SystemExit: 128 + signal number, where SIGINT or SIGTERM stopped the training.
    """
    import_modules(args.imports)
    plugins.detectors()  # imports the modules of installed packages
    if args.config_file.endswith(".py"):
        cfg, trainer_type = lazy.setup(args, distill), lazy.LazyDistillTrainer
    else:
        cfg, trainer_type = setup(args, distill), DistillTrainer
    folder = RunSettings.from_config(cfg).output_dir
    try:
        with told_when_full(folder):
            if args.eval_only:
                note_command(folder)
                return evaluate(cfg, trainer_type, args.resume, with_teacher=distill)
            trainer = trainer_type(cfg)
            if args.detect_anomaly:
                trainer.detect_anomaly()
            trainer.resume_or_load(resume=args.resume)
            if args.overwrite and comm.is_main_process():
                remove_run(folder)  # only now: what this run reads is loaded
            note_command(folder)
            trainer.log_start()
            trainer.evaluate_teacher()
            results = trainer.train()
            if not trainer.stop and comm.is_main_process():
                log_end(results, trainer.settings, args.config_file)
    finally:
        release(folder)
    if trainer.stop and (comm.get_world_size() == 1 or find_place()):  # among several, launch() exits
        sys.exit(trainer.stop.exit_code)
    return results
