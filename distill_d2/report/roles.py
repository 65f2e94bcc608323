"""Which run is the teacher, the student alone, or a distillation."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ..run_files import TEACHER_FOLDER
from ..teacher import teacher_weights
from .charts import color_number
from .kinds import Kind
from .runs import Run

TEACHER, ALONE, DISTILLED = "teacher", "student alone", "distilled"
# MODEL.DISTILLER of yaml files, and ``distiller`` of a LazyConfig.
_NODES = ("MODEL.DISTILLER.", "distiller.")
_TEACHER_KEYS = {"TEACHER_WEIGHTS": "", "MODEL_DISTILLER_CONFIG": "", "MODEL_LOAD_OFFICIAL": True}


@dataclass(frozen=True)
class Entry:
    """A kind of runs with its role, and the number of its color."""

    kind: Kind
    role: str
    color: int
    # Where its detector is, if not in the folder of its first run.
    config: str = ""
    weights: str = ""

    @property
    def name(self) -> str:
        return self.kind.name

    @property
    def run(self) -> Run:
        """The first of its runs, for what is shown of one run."""
        return self.kind.runs[0]


def entries_of(
    kinds: Sequence[Kind], teachers: Sequence[Kind] = (), alone: Sequence[Kind] = ()
) -> list[Entry]:
    """Teachers first, then students alone, then distillations.

    A run whose config has a teacher is a distillation; one whose folder has the weights that a distillation names
    is the teacher; others are students alone. Without a teacher's run, the evaluation of the teacher that a
    distillation has made stands for it.

    Args:
        kinds: whose roles are to be found.
        teachers, alone: those whose roles are given.
    """
    given = [*kinds, *teachers, *alone]
    folders = {os.path.dirname(path) for path in map(_weights_of_teacher, _runs(given)) if path}
    roles = {TEACHER: list(teachers), ALONE: list(alone), DISTILLED: []}
    for kind in kinds:
        roles[_role(kind.runs[0], folders)].append(kind)
    found = [(kind, role, "", "") for role, group in roles.items() for kind in group]
    if not roles[TEACHER]:
        found = [*_evaluated_teacher(_runs(given)), *found]
    colors = itertools.count()
    return [
        Entry(
            kind,
            role,
            0 if index == 0 and role == TEACHER else color_number(next(colors)),
            config,
            weights,
        )
        for index, (kind, role, config, weights) in enumerate(found)
    ]


def distiller_keys(run: Run) -> dict[str, object]:
    """The settings of MODEL.DISTILLER, without this prefix; {} of a run without a teacher."""
    whole = run.distillation or run.settings
    for node in _NODES:
        found = {
            key[len(node) :]: value
            for key, value in whole.items()
            if key.startswith(node) and value is not None
        }
        if found:
            return found
    return {}


def _runs(kinds: Sequence[Kind]) -> list[Run]:
    return [run for kind in kinds for run in kind.runs]


def _role(run: Run, folders_of_teachers: set[str]) -> str:
    if os.path.realpath(run.folder) in folders_of_teachers:
        return TEACHER
    return DISTILLED if distiller_keys(run) else ALONE


def _weights_of_teacher(run: Run) -> str:
    """The real path of the weights that a distillation names; "" where they are not known."""
    keys: Any = SimpleNamespace(**{**_TEACHER_KEYS, **distiller_keys(run)})
    weights = keys.TEACHER_WEIGHTS
    if not weights and keys.MODEL_DISTILLER_CONFIG.endswith(".yaml"):  # a .py file would run
        with contextlib.suppress(OSError, ValueError, KeyError):
            weights = teacher_weights(keys)
    return os.path.realpath(weights) if weights else ""


def _evaluated_teacher(runs: Sequence[Run]) -> list[tuple[Kind, str, str, str]]:
    """The teacher that one of the distillations has evaluated, with its config and weights; [] for none."""
    for run in runs:
        with contextlib.suppress(OSError):
            kind = Kind("teacher", [Run(os.path.join(run.folder, TEACHER_FOLDER))])
            config = str(distiller_keys(run).get("MODEL_DISTILLER_CONFIG", ""))
            return [(kind, TEACHER, config, _weights_of_teacher(run))]
    return []
