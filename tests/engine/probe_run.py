"""A training script that knows ProbeLoss: train_distill.py with one more loss registered.

Spawned processes import this file again, and so the loss.
"""

from probe_loss import ProbeLoss

from distill_d2 import DISTILL_LOSS_REGISTRY
from distill_d2.engine import argument_parser, launch, main

DISTILL_LOSS_REGISTRY.register(ProbeLoss)


def train(args):
    main(args, distill=True)


if __name__ == "__main__":
    launch(train, argument_parser().parse_args())
