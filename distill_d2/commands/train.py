"""Train a student with a teacher.

With --eval-only the student is evaluated, without any teacher.

    distill-d2 train --num-gpus 8 --config-file Distillation-PKD/retinanet_R_50_R101_pkd_FPN_1x.yaml
"""

from __future__ import annotations

import argparse
from functools import partial

from .arguments import add_training_arguments as add_arguments

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> None:
    from ..engine import launch, main

    launch(partial(main, distill=True), args)
