#!/usr/bin/env python
"""Which loss works with which detector: a step of each with a student and a teacher of each kind.

    tools/compatibility.py              # print the table
    tools/compatibility.py --reasons    # and why a loss is refused
    tools/compatibility.py --write      # put the table into README.md

A cell is "yes" where a step of the Distiller gives finite terms whose gradients reach the student, and
"no" where the Distiller says, when it is built, why that cannot be. Anything else is an error of ours,
and ends this program.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.events import EventStorage
from tabulate import tabulate

from distill_d2 import DISTILL_LOSS_REGISTRY, Distiller, DistillLoss, add_distill_config
from distill_d2.teacher import Teacher
from distill_d2.testing.family import Family, families

README = Path(__file__).resolve().parents[1] / "README.md"
MARKERS = ("<!-- compatibility -->\n", "<!-- /compatibility -->\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reasons", action="store_true", help="print the message of each refusal, too")
    parser.add_argument("--write", action="store_true", help="replace the table in README.md")
    args = parser.parse_args(arguments)
    refusals = all_refusals()
    print(table(refusals))
    if args.write:
        page = with_table(README.read_text(encoding="utf-8"), table(refusals))
        README.write_text(page, encoding="utf-8")
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
    torch.manual_seed(0)
    student, teacher = family.build(8), Teacher(family.build(16))
    try:
        model = Distiller(student=student, teacher=teacher, losses=[configured(name, family)])
    except (KeyError, TypeError, ValueError) as error:
        return str(error.args[0])
    own = set(terms_of(student, family))
    terms = terms_of(model, family)
    distilled = [term for key, term in terms.items() if key not in own]
    assert distilled and all(term.isfinite() for term in terms.values()), terms
    sum(distilled).backward()
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients), f"{terms} do not depend on the student"
    return ""


def configured(name: str, family: Family) -> DistillLoss:
    """The loss, as its keys are set for small detectors, on levels that this kind has."""
    cfg = get_cfg()
    add_distill_config(cfg)
    node = cfg.MODEL.DISTILLER
    _small_icd(node)
    node.GHND.IN_FEATURES = list(family.stages)
    node.FGFI.IN_FEATURES = list(family.levels)
    node.GID.IN_FEATURES = list(family.pooled)
    return DISTILL_LOSS_REGISTRY.get(name).from_config(node)


def _small_icd(node: CfgNode) -> None:
    node.INS.HIDDEN_DIM = 16
    node.BYPASS_DISTILL = 0  # the student is reached from the first iteration on


def terms_of(model: torch.nn.Module, family: Family) -> dict[str, torch.Tensor]:
    """What a training step computes."""
    with EventStorage(0):
        return model.train()(family.batch())


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
