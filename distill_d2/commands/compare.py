"""Show the last evaluations of runs side by side, class by class, and how sure a gain is.

RUN is the OUTPUT_DIR of a training, or of an evaluation alone; also one of its files: metrics.json, and
evaluations.json, which --eval-only writes. RUN/teacher is the teacher, where EVAL_TEACHER evaluated it.
Several seeds of one training are one column, with mean and standard deviation: join them by commas, or give a
pattern in quotes. NAME=RUN names a column. --runs takes a pattern of runs that lie in one folder per method.

    distill-d2 compare output/student output/distilled
    distill-d2 compare alone=output/student-1,output/student-2 'PKD=output/pkd-*'
    distill-d2 compare --runs 'output/*/seed*' --baseline alone
"""

from __future__ import annotations

import argparse
from typing import Any

_DRAWS, _FEWEST = 1000, 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", metavar="RUN", nargs="*", help="OUTPUT_DIR; others are compared with the first"
    )
    parser.add_argument(
        "--runs",
        metavar="PATTERN",
        dest="patterns",
        nargs="+",
        default=[],
        help="runs of several methods and seeds; the folder in which a run lies names its column",
    )
    parser.add_argument("--baseline", metavar="NAME", default="", help="default: the first")
    parser.add_argument(
        "--metric", default="", help="whose gains are examined (default: AP of the first task, bbox/AP)"
    )
    parser.add_argument(
        "--bootstrap",
        metavar="N",
        type=int,
        help=f"draws of test images for their interval; 0: none (default: {_DRAWS} with --runs, else 0)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of these draws (default: 0)")
    parser.add_argument(
        "--truth",
        metavar="JSON",
        default="",
        help="the test data's annotations in COCO's form (default: those of the runs' configs)",
    )
    parser.add_argument(
        "--format", choices=["markdown", "json"], default="markdown", help="default: markdown"
    )


def run(args: argparse.Namespace) -> None:
    import json

    from ..report.gain_table import gains_as_json, gains_as_markdown
    from ..report.gains import gains_of
    from ..report.kinds import kinds_of, kinds_of_folders, with_baseline
    from ..report.tables import as_markdown, as_values, weights_as_markdown, weights_of

    draws = _draws(args)
    kinds = with_baseline([*kinds_of(args.runs), *kinds_of_folders(args.patterns)], args.baseline)
    if not kinds:
        raise ValueError("no run is given; expected RUN or --runs PATTERN")
    gains = None
    if (
        args.patterns
        or draws
        or args.metric
        or (len(kinds) > 1 and any(len(kind.runs) > 1 for kind in kinds))
    ):
        gains = gains_of(kinds, args.metric, draws=draws, seed=args.seed, truth=args.truth)
    if args.format == "json":
        content: dict[str, Any] = dict(as_values(kinds))
        content.update({"gains": gains_as_json(gains)} if gains else {})
        content.update({"weights": weights_of(kinds)} if weights_of(kinds) else {})
        print(json.dumps(content, indent=2))
        return
    parts = [as_markdown(kinds), weights_as_markdown(kinds), gains_as_markdown(gains) if gains else ""]
    print("\n".join(filter(None, parts)))


def _draws(args: argparse.Namespace) -> int:
    draws = args.bootstrap
    if draws is None:
        return _DRAWS if args.patterns else 0
    if draws != 0 and draws < _FEWEST:
        raise ValueError(f"--bootstrap {draws}: expected 0, or at least {_FEWEST} draws")
    return draws
