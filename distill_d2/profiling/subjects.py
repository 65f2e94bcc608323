"""The detectors to measure: of runs, of configs, and their teachers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from detectron2.config import CfgNode, get_cfg
from torch import nn

from .. import model_zoo
from ..config import add_distill_config, load_yaml, student_config
from ..config_values import set_options
from ..engine.config_loading import locate_teacher
from ..engine.config_writing import DISTILLATION_FILE
from ..engine.settings import distiller_node
from ..inference import Source, build_detector, find_run, load_source
from ..inference.titles import titles_of
from ..lazy_config import apply_overrides, load_lazy_config
from .parts import parameters

_NODE = "MODEL.DISTILLER."


@dataclass(frozen=True)
class Subject:
    """A detector to measure.

    Attributes:
        model: in eval.
        config: its own, without a teacher.
        trained: False: its weights are random.
        teacher: the title of its teacher among the subjects, or of what it is compared with; "": of none.
    """

    model: nn.Module
    config: Any
    trained: bool
    teacher: str = ""


def find_subjects(
    runs: Sequence[str], config_files: Sequence[str], opts: Sequence[str] = (), device: str = "cpu"
) -> dict[str, Subject]:
    """The detectors of runs, with their weights, and those of configs, with random ones; each behind its teacher,
    where it is known. A teacher has its weights where these are a file here. What has no teacher is compared with
    the only teacher, or, where there is none, with the largest.

    Args:
        runs: see ``find_run``.
        config_files: paths or packaged names.
        opts: KEY VALUE pairs of the configs.

    Returns:
        subjects by titles that are different.

    Raises:
        FileNotFoundError, OSError, ValueError, KeyError: something does not exist or does not fit.
    """
    titles = titles_of([*runs, *config_files])
    found = _Found(device, titles)
    sources = {title: find_run(run) for title, run in zip(titles, runs)}
    found.names = {os.path.realpath(source.weights): title for title, source in sources.items()}
    for title, source in sources.items():
        teacher = found.teacher(_distiller_of_run(source.name), title, needed=False)
        found.subjects[title] = Subject(load_source(source, device).model, source.config, True, teacher)
    for title, name in zip(titles[len(runs) :], config_files):
        source, node = _of_config(model_zoo.find_config(name), opts)
        teacher = found.teacher(node, title, needed=True)
        model = build_detector(source, device)
        found.subjects[title] = Subject(model, source.config, False, teacher)
    return _compared(found.subjects)


def _compared(subjects: dict[str, Subject]) -> dict[str, Subject]:
    """The subjects, each with something to compare it with: see ``find_subjects``."""
    teachers = {each.teacher for each in subjects.values() if each.teacher}
    if len(teachers) > 1:
        return subjects
    sizes = {title: sum(parameters(each.model).values()) for title, each in subjects.items()}
    (teacher,) = teachers or {max(subjects, key=lambda title: sizes[title])}
    return {
        title: each if title == teacher else replace(each, teacher=teacher)
        for title, each in subjects.items()
    }


class _Found:
    """Subjects so far, and the titles of weights' files, so that a teacher is measured once."""

    def __init__(self, device: str, titles: Sequence[str]):
        """
        Args:
            titles: that teachers may not have.
        """
        self.device = device
        self.taken = set(titles)
        self.subjects: dict[str, Subject] = {}
        self.names: dict[str, str] = {}

    def teacher(self, node: CfgNode | None, student: str, needed: bool) -> str:
        """The title of the teacher that a node MODEL.DISTILLER names, added to the subjects; "" without one.

        Args:
            student: the title of its student.
            needed: False: a teacher whose files are not here is left out.
        """
        if node is None:
            return ""
        try:
            source = find_run(model_zoo.find_config(node.MODEL_DISTILLER_CONFIG), node.TEACHER_WEIGHTS)
        except FileNotFoundError:
            if needed:
                raise
            return ""
        trained = os.path.isfile(source.weights)
        key = os.path.realpath(source.weights) if trained else source.name
        if key not in self.names:
            title = f"teacher of {student}" if "teacher" in self.taken else "teacher"
            self.names[key] = title
            self.taken.add(title)
            if trained:
                model = load_source(source, self.device).model
            else:
                model = build_detector(source, self.device)
            self.subjects[title] = Subject(model, source.config, trained)
        return self.names[key]


def _distiller_of_run(run: str) -> CfgNode | None:
    """MODEL.DISTILLER of a distillation's OUTPUT_DIR; None of other runs."""
    path = os.path.join(run, DISTILLATION_FILE)
    if not os.path.isfile(path):
        return None
    cfg = _defaults()
    load_yaml(cfg, path)
    return cfg.MODEL.DISTILLER


def _of_config(path: str, opts: Sequence[str]) -> tuple[Source, CfgNode | None]:
    """The student of a config, and MODEL.DISTILLER where it sets any of its keys."""
    if path.endswith(".py"):
        lazy = apply_overrides(load_lazy_config(path, ["model"]), opts)
        node = distiller_node(lazy.distiller) if "distiller" in lazy else None
        folders = [os.path.dirname(path)]
        lazy.model = lazy.model.get("student", lazy.model)  # of a whole Distiller
        source = Source(path, lazy, "")
    else:
        cfg = _defaults()
        files = load_yaml(cfg, path)
        set_options(cfg, opts)
        folders = files.folders
        is_set = "DISTILLER" in (files.values.get("MODEL") or {}) or any(
            key.startswith(_NODE) for key in opts[::2]
        )
        node = cfg.MODEL.DISTILLER if is_set else None
        source = Source(path, student_config(cfg), "")
    if node is not None and not node.MODEL_LOAD_OFFICIAL:
        node.MODEL_DISTILLER_CONFIG = locate_teacher(node.MODEL_DISTILLER_CONFIG, folders, needed=True)
    return source, node


def _defaults() -> CfgNode:
    cfg = get_cfg()
    add_distill_config(cfg)
    return cfg
