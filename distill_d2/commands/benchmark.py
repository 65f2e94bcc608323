"""Time and memory of what distillation costs.

The parts of a step are measured in turn in one process.

    distill-d2 benchmark --config-file Distillation-PKD/retinanet_R_50_R101_pkd_FPN_1x.yaml \\
        --size 512 --threads 1 SOLVER.AMP.ENABLED True

Works on generated images and random weights (a teacher's with MODEL.DISTILLER.TEACHER_WEIGHTS), with
learning rate 0, so that every round does the same work. Each round runs, after one round of warm-up:

    student step             forward, backward and optimizer of the student alone; in pure distillation of
                             features (TASK_LOSS_WEIGHT 0) only of the part that the losses read, with
                             a loss that costs next to nothing
    teacher part, plain      the part of the teacher that the losses use, as detectron2 built it
    distilled step           forward, backward and all optimizers of the Distiller
    distilled step, teacher cached   the same with the teacher's outputs from memory, see TEACHER_CACHE
    teacher part, prepared   the part as the Distiller runs it
    teacher whole, plain     the whole prediction
    <loss> alone             forward and backward of one loss on recorded features, and the update of
                             its parameters where it has an optimizer of its own
    <loss> part: ...         forward and backward of its parts, where PARTS names any; GID's selection,
                             which has no backward, also on generated predictions for about 5, 20
                             and 80 thousand anchors: at a linear cost each ratio of two is 4, or
                             less where a fixed cost counts

The headline is the ratio distilled step / (student step + teacher part, plain), taken in each round. Beside it are
the ratios of the distilled step, with and without a cached teacher, to the student step.
Beside "<loss> alone" runs "<loss> alone, naive formula", and time and peak memory of the two are
compared: always for PKD, whose formula takes a few lines; with --against-naive also where it is slower
(distill_d2/benchmark/naive.py): DeFeat, GID of RetinaNets, and InstanceConditionalDistillation (about twice the
time of the loss), whose naive versions are in tests/, which only a checkout has.
On a CPU ratios are of process time, which other work on the machine disturbs least; on a GPU they
are of the time between two events of its stream.
"""

from __future__ import annotations

import argparse

from .arguments import add_config_arguments, add_device_argument


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument(
        "--size", metavar="HxW", default="512", help="of the images in pixels (default: 512, for both)"
    )
    parser.add_argument("--batch", metavar="N", type=int, default=2, help="images per step (default: 2)")
    parser.add_argument(
        "--objects", metavar="N", type=int, default=8, help="objects per image (default: 8)"
    )
    parser.add_argument("--rounds", metavar="N", type=int, default=5, help="default: 5")
    parser.add_argument(
        "--warmup", metavar="N", type=int, default=1, help="rounds that are not counted (default: 1)"
    )
    add_device_argument(parser)
    parser.add_argument(
        "--threads",
        metavar="N",
        type=int,
        default=0,
        help="of torch on a CPU; 0: as it chooses (default: 0)",
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of images and weights (default: 0)"
    )
    parser.add_argument(
        "--against-naive", action="store_true", help="time the slow naive versions of losses too"
    )
    parser.add_argument("--json", metavar="FILE", help="write the measurements of every round here, too")


def run(args: argparse.Namespace) -> None:
    from ..benchmark.measure import benchmark

    benchmark(args)
