"""Train a detector without a teacher.

Any detectron2 config, or a distillation config, whose student is trained alone.

    distill-d2 baseline --num-gpus 8 --config-file COCO-Detection/retinanet_R_50_FPN_1x.yaml
"""

from __future__ import annotations

import argparse
from functools import partial

from .arguments import add_training_arguments as add_arguments

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> None:
    from ..engine import launch, main

    launch(partial(main, distill=False), args)
