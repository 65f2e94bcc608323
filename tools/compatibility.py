#!/usr/bin/env python
"""Which loss works with which detector: a step of each with a student and a teacher of each kind.

    tools/compatibility.py              # print the table
    tools/compatibility.py --reasons    # and why a loss is refused
    tools/compatibility.py --write      # put the table into docs/which_method.md

A cell is "yes" where a step of the Distiller gives finite terms whose gradients reach the student, and
"no" where the Distiller says, when it is built, why it refuses the two. Anything else is an error, which
ends this program. Losses are set as distill_d2/testing/recipes.py says.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from distill_d2 import DISTILL_LOSS_REGISTRY
from distill_d2.testing import Cell, Family, families, recipes
from distill_d2.testing.laws import trains_the_student

PAGE = Path(__file__).resolve().parents[1] / "docs" / "which_method.md"
MARKERS = ("<!-- compatibility -->\n", "<!-- /compatibility -->\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reasons", action="store_true", help="print the message of each refusal, too")
    parser.add_argument("--write", action="store_true", help="replace the table in docs/which_method.md")
    args = parser.parse_args(arguments)
    refusals = all_refusals()
    print(table(refusals))
    if args.write:
        page = with_table(PAGE.read_text(encoding="utf-8"), table(refusals))
        PAGE.write_text(page, encoding="utf-8")
    for (loss, detector), reason in refusals.items():
        if args.reasons and reason:
            print(f"{loss}, {detector}: {reason}\n")


def losses() -> list[str]:
    """The registered losses."""
    return sorted(name for name, _ in DISTILL_LOSS_REGISTRY)


def all_refusals() -> dict[tuple[str, str], str]:
    """``refusal`` of each loss and detector."""
    kinds = families().items()
    return {(loss, name): refusal(loss, family) for loss in losses() for name, family in kinds}


def refusal(name: str, family: Family) -> str:
    """Why a loss does not work with a kind of detector, or "", after a step, where it does.

    Raises:
        AssertionError: the step was taken, but its terms are not finite, or do not reach the student.
    """
    cell = Cell.of_recipe(recipes()[name], family)
    if not cell.refusal:
        trains_the_student(cell)
    return cell.refusal


def table(refusals: dict[tuple[str, str], str]) -> str:
    """In markdown, a row per loss and a column per detector."""
    names = list(dict.fromkeys(detector for _, detector in refusals))
    works = {cell: "no" if reason else "yes" for cell, reason in refusals.items()}
    rows = [[f"`{loss}`", *(works[loss, name] for name in names)] for loss in losses()]
    return tabulate(rows, headers=["", *names], tablefmt="pipe")


def with_table(text: str, new: str) -> str:
    """A page with the table between its markers replaced."""
    start, end = MARKERS
    head, found, rest = text.partition(start)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the page has no {start.strip()} with {end.strip()} after it")
    return f"{head}{start}{new}\n{end}{tail}"


if __name__ == "__main__":
    main()
