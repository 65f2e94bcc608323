#!/usr/bin/env python
"""Train or evaluate a detector without a teacher: any detectron2 config, or a distillation config
with the distiller ignored.

    train_baseline.py --num-gpus 8 --config-file COCO-Detection/retinanet_R_50_FPN_1x.yaml

The same as `distill-d2 baseline`.
"""

import sys

from distill_d2.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("baseline"))
