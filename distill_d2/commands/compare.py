"""Show the last evaluations of runs side by side, class by class.

RUN is the OUTPUT_DIR of a training, or of an evaluation alone; also one of its files: metrics.json, and
evaluations.json, which --eval-only writes. RUN/teacher is the teacher, where EVAL_TEACHER evaluated it.
Several seeds of one training are one column, with mean and standard deviation: join them by commas, or give a
pattern in quotes. NAME=RUN names a column.

    distill-d2 compare output/student output/distilled
    distill-d2 compare alone=output/student-1,output/student-2 'PKD=output/pkd-*'
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="OUTPUT_DIR; others are compared with the first"
    )
    parser.add_argument(
        "--format", choices=["markdown", "json"], default="markdown", help="default: markdown"
    )


def run(args: argparse.Namespace) -> None:
    from ..report.kinds import kinds_of
    from ..report.tables import as_json, as_markdown

    kinds = kinds_of(args.runs)
    print(as_json(kinds) if args.format == "json" else as_markdown(kinds))
