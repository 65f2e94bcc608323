"""What train_baseline.py and train_distill.py do in each process."""

from __future__ import annotations

import argparse
import sys
from typing import Any, Dict

from detectron2.evaluation import verify_results
from detectron2.utils import comm

from ..checkpoint import SafeCheckpointer
from ..data import end_workers
from . import lazy
from .setup import setup
from .trainer import DistillTrainer


def main(args: argparse.Namespace, distill: bool) -> Any:
    """Train, or with --eval-only evaluate, what the arguments say.

    Args:
        args: of ``argument_parser``.
        distill: with a teacher, or the student alone.

    Returns:
        the results of the evaluation.

    Raises:
        SystemExit: 128 + signal number, where SIGINT or SIGTERM stopped the training.
    """
    if args.config_file.endswith(".py"):
        cfg, trainer_type = lazy.setup(args, distill), lazy.LazyDistillTrainer
    else:
        cfg, trainer_type = setup(args, distill), DistillTrainer
    if args.eval_only:
        return evaluate(cfg, trainer_type, args.resume)
    trainer = trainer_type(cfg)
    trainer.resume_or_load(resume=args.resume)
    results = trainer.train()
    if trainer.stop and comm.get_world_size() == 1:  # among several, launch() exits
        sys.exit(128 + trainer.stop.signal)
    return results


def evaluate(cfg: Any, trainer: type, resume: bool = False) -> Dict[str, Any]:
    """Evaluate the student of MODEL.WEIGHTS, or with ``resume`` of OUTPUT_DIR's last checkpoint.

    Raises:
        ValueError: there are no weights, or they do not fill the model.
    """
    model = trainer.build_model(cfg)
    checkpointer = SafeCheckpointer(model, save_dir=trainer._output_dir(cfg))
    weights = trainer._weights(cfg)
    if not weights and not (resume and checkpointer.has_checkpoint()):
        raise ValueError("--eval-only needs weights: set MODEL.WEIGHTS, or --resume with OUTPUT_DIR")
    checkpointer.resume_or_load(weights, resume=resume, with_losses=False)
    keys = checkpointer.incompatible
    missing = keys.missing_keys + [name for name, _, _ in keys.incorrect_shapes]
    if missing:
        raise ValueError(
            f"--eval-only: the weights do not fill the model; {len(missing)} of its tensors are "
            f"missing or of another shape: {sorted(set(missing))[:10]}"
        )
    try:
        results = trainer.test(cfg, model)
    finally:
        end_workers()
    if comm.is_main_process() and hasattr(cfg, "TEST"):
        verify_results(cfg, results)
    return results
