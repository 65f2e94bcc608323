"""A training script that knows ProbeLoss: train_distill.py with one more loss registered.

Spawned processes import this file again, and so the loss.
"""

import probe_loss  # noqa: F401  registers the loss

from distill_d2.engine import argument_parser, launch, main


def train(args):
    main(args, distill=True)


if __name__ == "__main__":
    launch(train, argument_parser().parse_args())
