#!/usr/bin/env python
"""Train a student with a teacher; with --eval-only evaluate the student, without any teacher.

train_distill.py --num-gpus 8 --config-file Distillation-PKD/retinanet_R_50_R101_pkd_FPN_1x.yaml [KEY VALUE ...]
"""

import signal

# Ctrl-C while modules are imported ends the program without a traceback.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from distill_d2.engine import argument_parser, launch, main


def train(args):
    return main(args, distill=True)


if __name__ == "__main__":
    launch(train, argument_parser().parse_args())
