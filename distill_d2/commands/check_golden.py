"""Compare golden fixtures, what other implementations returned, with this package.

Runs each fixture through the public classes and prints the largest absolute and relative error of each array, and
pass or FAIL against the tolerance that the fixture states. Exit status: 0 all pass, 1 an array fails, 2 a file is
unreadable or of no known kind. A kind of fixture is one file in distill_d2/golden/.

    distill-d2 check-golden FIXTURE.npz [FIXTURE.npz ...]
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("fixtures", nargs="+", metavar="FIXTURE.npz")


def run(args: argparse.Namespace) -> int:
    from ..golden.check import check_files

    return check_files(args.fixtures)
