#!/usr/bin/env python
"""Train a student with a teacher; with --eval-only evaluate the student, without any teacher.

    train_distill.py --num-gpus 8 --config-file Distillation-PKD/retinanet_R_50_R101_pkd_FPN_1x.yaml

The same as `distill-d2 train`.
"""

import sys

from distill_d2.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("train"))
