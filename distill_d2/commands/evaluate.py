"""Evaluate a detector on its test datasets.

The same as `train --eval-only`: a distillation config's student is evaluated, without any teacher. With
MODEL.DISTILLER.EVAL_TEACHER True the teacher is evaluated beside it.

    distill-d2 evaluate --num-gpus 8 --config-file output/pkd/config.yaml MODEL.WEIGHTS output/pkd/model_final.pth
"""

from __future__ import annotations

import argparse
from functools import partial

from .arguments import add_training_arguments as add_arguments

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> None:
    from ..engine import launch, main

    args.eval_only = True
    launch(partial(main, distill=True), args)
