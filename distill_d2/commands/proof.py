"""Repeat the proof that distillation helps: real photos, pretrained weights, seeds, significance.

Trains teachers, students alone and distilled students on a folder of photos (docs/proof.md says which, and what
the table means), then evaluates all of them on the test set, once, and writes OUTPUT/table.md and table.json. It
takes hours on two CPU cores: --list tells how many. Started again, it goes on where it was stopped; what is
finished is not repeated. --test evaluates the same runs on other photos.

    distill-d2 proof --data datasets/voc_animals --list
    distill-d2 proof --data datasets/voc_animals
    distill-d2 proof --data datasets/voc_animals --test kept.json --test-images kept/
"""

from __future__ import annotations

import argparse

from ..proof.rows import METHODS, PAIRS

SEEDS, BEST_SEEDS = 3, 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--data",
        metavar="FOLDER",
        help="annotations/{train,val,test}.json and images/ (default: $DETECTRON2_DATASETS/voc_animals)",
    )
    add("--test", metavar="JSON", default="", help="another test set, of finished runs too")
    add("--test-images", metavar="FOLDER", default="", help="its images (default: those of --data)")
    add(
        "--output", metavar="FOLDER", default="output/proof", help="for the runs (default: output/proof)"
    )
    add(
        "--pairs",
        metavar="PAIR",
        nargs="+",
        choices=list(PAIRS),
        default=list(PAIRS),
        help=f"{', '.join(PAIRS)} (default: all)",
    )
    add(
        "--only",
        metavar="ROW",
        nargs="+",
        choices=METHODS,
        help=f"of the distillations these: {', '.join(METHODS)} (default: all)",
    )
    add("--seeds", metavar="N", type=int, default=SEEDS, help=f"of each row (default: {SEEDS})")
    add(
        "--best-seeds",
        metavar="N",
        type=int,
        default=BEST_SEEDS,
        help=f"of the two RetinaNets that are best on val (default: {BEST_SEEDS})",
    )
    add("--processes", metavar="N", type=int, help="at a time (default: one per core)")
    add(
        "--num-gpus",
        metavar="N",
        type=int,
        default=0,
        help="GPUs of each run; 0: on the CPU (default: 0)",
    )
    add("--list", action="store_true", help="tell the runs and their hours, and run nothing")
    add("--no-gates", action="store_true", help="go on where a gate does not hold; the table says so")
    add("--no-test", action="store_true", help="stop before the test set is read")
    add("opts", metavar="KEY VALUE", nargs=argparse.REMAINDER, help="for all trainings")


def run(args: argparse.Namespace) -> None:
    from ..proof.driver import Proof
    from ..proof.processes import physical_cores, run_jobs
    from ..proof.settings import Settings

    proof = Proof(Settings.from_arguments(args), args.processes or physical_cores(), run_jobs)
    if args.list:
        return proof.tell()
    proof.run(stop_at_gates=not args.no_gates, with_test=not args.no_test)
