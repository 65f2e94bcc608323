#!/usr/bin/env python
"""Train or evaluate a detector without a teacher: any detectron2 config, or a distillation config
with the distiller ignored.

    train_baseline.py --num-gpus 8 --config-file COCO-Detection/retinanet_R_50_FPN_1x.yaml [KEY VALUE ...]
"""

import signal

# Ctrl-C while modules are imported ends the program without a traceback.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from distill_d2.engine import argument_parser, launch, main


def train(args):
    return main(args, distill=False)


if __name__ == "__main__":
    launch(train, argument_parser().parse_args())
