#!/usr/bin/env python
"""Compare the last evaluations of runs, class by class.

    tools/compare_results.py output/student output/distilled [output/another ...]

RUN is the OUTPUT_DIR of a training (its metrics.json is read). Per dataset and task one table: a row per
class (VOC: AP at IoU 0.5; COCO: AP), then the means, a column per run, and the differences to the first.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

Metrics = dict[str, float]  # of one dataset and task, by name: "AP50-dog", "AP"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program; exits with status 2 and a message if there is nothing to compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("first", metavar="RUN", help="the one to compare with")
    parser.add_argument("others", metavar="RUN", nargs="+")
    args = parser.parse_args(arguments)
    runs = [args.first, *args.others]
    try:
        results = [last_evaluation(Path(run)) for run in runs]
        tables = {task: rows_of([result.get(task, {}) for result in results]) for task in results[0]}
    except (OSError, ValueError) as error:
        parser.exit(2, f"compare_results: {error}\n")
    tables = {task: rows for task, rows in tables.items() if rows}
    if not tables:
        parser.exit(2, f"compare_results: {runs} have no metrics in common\n")
    header = ["", *names_of(runs), *(f"{name} - first" for name in names_of(runs)[1:])]
    for task, rows in tables.items():
        print(f"{task}\n" + tabulate(rows, headers=header, tablefmt="pipe", floatfmt=".2f") + "\n")


def last_evaluation(run: Path) -> dict[str, Metrics]:
    """Metrics by dataset and task ("bbox", or "voc_2007_test/bbox" where there are several datasets).

    Raises:
        OSError, ValueError: the run has no metrics.json, or no evaluation in it.
    """
    path = run / "metrics.json"
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' does not exist; expected the OUTPUT_DIR of a training")
    found: dict[str, Metrics] = {}
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        found = evaluation_of(read_line(path, number, line)) or found
    if not found:
        raise ValueError(f"'{path}' holds no evaluation: the training has not reached one")
    return found


def read_line(path: Path, number: int, line: str) -> dict[str, float]:
    try:
        scalars = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"'{path}', line {number}, is not JSON: {error}") from error
    if not isinstance(scalars, dict):
        raise ValueError(f"'{path}', line {number}, holds no numbers by name")
    return scalars


def evaluation_of(scalars: dict[str, float]) -> dict[str, Metrics]:
    """The evaluation among the scalars of an iteration; {} if there is none."""
    found: dict[str, Metrics] = {}
    for key, value in scalars.items():
        task, _, metric = key.rpartition("/")
        found.setdefault(task, {})[metric] = value
    return {task: metrics for task, metrics in found.items() if "AP" in metrics}


def rows_of(results: Sequence[Metrics]) -> list[list[object]]:
    """Classes first, then the other metrics: name, each run's value, differences to the first run's."""
    common = [name for name in results[0] if all(name in result for result in results)]
    classes = [name for name in common if "-" in name]
    rows = []
    for name in [*classes, *(name for name in common if name not in classes)]:
        values = [result[name] for result in results]
        label = name.partition("-")[2] if name in classes else name
        rows.append([label, *values, *(value - values[0] for value in values[1:])])
    return rows


def names_of(runs: Sequence[str]) -> list[str]:
    """Short names: the last folders where these differ, otherwise the whole paths."""
    short = [Path(run).name for run in runs]
    return short if len(set(short)) == len(runs) else list(runs)


if __name__ == "__main__":
    main()
