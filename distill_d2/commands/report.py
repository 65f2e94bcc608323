"""Write one HTML page about runs: results, curves, pictures, settings.

The page is a single file that needs no network. It has AP over iterations and per class, size and speed, pictures
of the test images on which the detectors differ most, losses, gradients, all settings, and the commands. RUN is
as in `compare`: an OUTPUT_DIR, several seeds joined by commas, with NAME= before it if wanted. Which run is the
teacher and which the student alone is found in their configs; --teacher and --student say so.

    distill-d2 report output/teacher output/student output/pkd --output report.html
    distill-d2 report output/pkd --student alone=output/s1,output/s2
"""

from __future__ import annotations

import argparse

from ..imports import add_import_argument
from ..report.kinds import kinds_of
from .arguments import add_device_argument, chosen_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="*", help="OUTPUT_DIR of a training or evaluation")
    parser.add_argument("--teacher", metavar="RUN", action="append", default=[], help="a teacher's run")
    parser.add_argument(
        "--student", metavar="RUN", action="append", default=[], help="a run of the student alone"
    )
    parser.add_argument("--output", metavar="FILE", default="report.html", help="default: report.html")
    parser.add_argument("--title", help="of the page; default: the names of the runs")
    parser.add_argument(
        "--pictures", metavar="N", type=int, default=6, help="test images to show (default: 6)"
    )
    parser.add_argument(
        "--images",
        metavar="N",
        type=int,
        default=60,
        help="test images to choose them from (default: 60)",
    )
    add_import_argument(parser)
    add_device_argument(parser)


def run(args: argparse.Namespace) -> None:
    for run in (*args.runs, *args.teacher, *args.student):
        kinds_of([run])  # before the slow imports: does it exist?

    from ..imports import import_modules
    from ..report.making import make_report

    import_modules(args.imports)
    make_report(
        args.runs,
        args.output,
        teachers=args.teacher,
        alone=args.student,
        title=args.title or "",
        show=args.pictures,
        look_at=args.images,
        device=chosen_device(args),
    )
