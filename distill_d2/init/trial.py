"""A few steps of the proposed detectors: how long they take, and how strongly the distillation pulls."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Callable

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import nn

from ..balance import balanced_weight
from ..checkpoint.initial import load_initial_weights
from ..data import build_mapper, training_records
from ..engine import load_config
from ..gradients import term_gradients
from ..profiling.timing import clock
from ..quiet import quiet
from ..random_state import unchanged_random_state

_SECONDS, _MOST_ROUNDS = 3.0, 10
_BATCHES = 3
_SEED = 1


@dataclass(frozen=True)
class Trial:
    """What was measured, on this machine.

    Attributes:
        data: seconds in which an image is read and prepared.
        teacher_step, student_step, distilled_step: seconds per training step, without the data.
        teacher_image, student_image: seconds per image of an evaluation, without the data.
        weight: of PKD, at which its gradient in the student's backbone is as long as the task's, both detectors
            untrained, to two digits. Since PKD does not depend on the scale of the teacher's features, the
            teacher's training changes it little. None: a gradient is 0.
    """

    data: float
    teacher_step: float
    student_step: float
    distilled_step: float
    teacher_image: float
    student_image: float
    weight: float | None


def try_out(folder: str, device: str) -> Trial:
    """Train the detectors of a folder's distill.yaml and teacher.yaml for a few steps, from random weights, but
    for those of backbones that are installed; nothing is written but to a temporary folder.

    Args:
        device: of torch.

    Raises:
        FileNotFoundError, OSError, ValueError, KeyError: the configs do not load or fit.
    """
    common = ["MODEL.DEVICE", device, "MODEL.WEIGHTS", ""]
    with quiet(), unchanged_random_state(), tempfile.TemporaryDirectory() as temporary:
        seed_all_rng(_SEED)
        teacher_cfg = load_config(os.path.join(folder, "teacher.yaml"), common)
        teacher = build_model(teacher_cfg)
        load_initial_weights(teacher)
        weights = os.path.join(temporary, "teacher.pth")
        torch.save({"model": teacher.state_dict()}, weights)
        distiller = ["MODEL.META_ARCHITECTURE", "Distiller", "MODEL.DISTILLER.STUDENT_META_ARCH"]
        distiller += [teacher_cfg.MODEL.META_ARCHITECTURE, "MODEL.DISTILLER.TEACHER_WEIGHTS", weights]
        cfg = load_config(os.path.join(folder, "distill.yaml"), [*common, *distiller])
        model = build_model(cfg)
        load_initial_weights(model)
        return _measure(cfg, teacher, model)


def _measure(cfg: CfgNode, teacher: nn.Module, distiller: Any) -> Trial:
    batches = _batches(cfg)
    measured = term_gradients(distiller, *batches)
    weight = balanced_weight("PKD", distiller.losses["PKD"], measured)
    batch, student = batches[0], distiller.student
    seconds = _median_seconds(
        {
            "data": lambda: _batches(cfg, 1),
            "teacher_step": _training(teacher, batch),
            "student_step": _training(student, batch),
            "distilled_step": _training(distiller, batch),
            "teacher_image": _evaluation(teacher, batch[:1]),
            "student_image": _evaluation(student, batch[:1]),
        }
    )
    seconds["data"] /= len(batch)
    return Trial(**seconds, weight=weight)


def _median_seconds(tasks: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Of rounds that run all tasks, after one of warm-up."""
    rounds: list[dict[str, float]] = []
    started = clock()
    while len(rounds) < 2 or (len(rounds) < _MOST_ROUNDS and clock() - started < _SECONDS):
        times = {}
        for name, task in tasks.items():
            start = clock()
            task()
            times[name] = clock() - start
        rounds.append(times)
    return {name: statistics.median(times[name] for times in rounds[1:]) for name in tasks}


def _batches(cfg: CfgNode, count: int = _BATCHES) -> list[list[dict[str, Any]]]:
    """Batches of images, spread over those that are trained on."""
    records = training_records(cfg)
    mapper = build_mapper(cfg, is_train=True)
    size = cfg.SOLVER.IMS_PER_BATCH
    chosen = [records[i * len(records) // (count * size)] for i in range(count * size)]
    return [[mapper(record) for record in chosen[i * size : (i + 1) * size]] for i in range(count)]


def _training(model: nn.Module, batch: Sequence[dict[str, Any]]) -> Callable[[], None]:
    def step() -> None:
        model.train()
        with EventStorage():
            sum(model(batch).values()).backward()
        model.zero_grad(set_to_none=True)

    return step


def _evaluation(model: nn.Module, batch: Sequence[dict[str, Any]]) -> Callable[[], None]:
    def evaluate() -> None:
        model.eval()
        with torch.inference_mode():
            model(batch)

    return evaluate
