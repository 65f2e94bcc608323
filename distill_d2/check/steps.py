"""What a training step does and costs, measured on the first batches of a run."""

from __future__ import annotations

import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.utils.events import EventStorage

from ..distiller import Distiller
from ..engine import DistillTrainer
from ..engine.gradient_examples import BATCH, gradient_examples
from ..gradients import TermGradients, acting_iteration, term_gradients

_WARM_UP, _STEPS = 1, 5
_TESTED = 3  # images whose evaluation is timed


@dataclass(frozen=True)
class StepCost:
    """Of a training step.

    Attributes:
        seconds: of the whole step.
        parts: seconds of its parts; the rest is the backward pass and the update.
        memory: peak of the GPU's, or else of the process's, in bytes.
    """

    seconds: float
    parts: dict[str, float]
    memory: int


def first_batch(trainer: DistillTrainer) -> list[dict[str, Any]]:
    """With which the training would start."""
    return next(trainer._trainer._data_loader_iter)


def measure_gradients(trainer: DistillTrainer, count: int) -> TermGradients:
    """Where most losses act, on ``count`` batches of four images; with three as a training does at its
    start, which sets the weights of losses with a GRADIENT_RATIO."""
    trainer._ratios.before(0)
    with gradient_examples(trainer._trainer.data_loader, trainer.settings, count) as batches:
        if batches is None:
            batches = [first_batch(trainer)[:BATCH] for _ in range(count)]
        return term_gradients(trainer.plain_model, *batches)


def measure_steps(trainer: DistillTrainer) -> StepCost:
    """Train some steps, at the iteration at which all losses act; the cost of the median one."""
    model = trainer.plain_model
    start = acting_iteration(model) + trainer.loss_training.pretrain_iters
    _forget_peak()
    costs = []
    for index in range(_WARM_UP + _STEPS):
        trainer.iter = start + index
        with EventStorage(trainer.iter) as storage, _timed_parts(model) as parts:
            began = _now()
            trainer.run_step()
            seconds = _now() - began
            costs.append({"step": seconds, "data": storage.latest()["data_time"][0], **parts})
    costs = sorted(costs[_WARM_UP:], key=lambda cost: cost["step"])
    median = costs[len(costs) // 2]
    return StepCost(median.pop("step"), median, _peak())


def evaluation_seconds(trainer: DistillTrainer) -> float:
    """Seconds of one evaluation, of the student on all test datasets, without the evaluators."""
    model, seconds = trainer.plain_model, 0.0
    model.eval()
    with torch.no_grad():
        for loader in _test_loaders(trainer):
            times = []
            batches = iter(loader)
            for _ in range(min(_TESTED, len(loader))):
                began = _now()
                model(next(batches))
                times.append(_now() - began)
            seconds += statistics.median(times or [0.0]) * len(loader)
    model.train()
    return seconds


def _test_loaders(trainer: DistillTrainer) -> list[Any]:
    cfg: Any = trainer.cfg
    if isinstance(cfg, CfgNode):
        return [trainer.build_test_loader(cfg, name) for name in cfg.DATASETS.TEST]
    return [instantiate(cfg.dataloader.test)] if "evaluator" in cfg.dataloader else []


@contextlib.contextmanager
def _timed_parts(model: Any) -> Iterator[dict[str, float]]:
    """Inside, the seconds of each part's calls add up. The heads of a teacher run when a loss asks for them."""
    calls = [("student", model, "forward")]
    if isinstance(model, Distiller):
        calls = [("student", model.student, "forward"), ("teacher", model.teacher, "observe")]
        calls += [("losses", loss, "forward") for loss in model.losses.values()]
    seconds = {part: 0.0 for part, _, _ in calls}
    for part, owner, name in calls:
        setattr(owner, name, _timed(getattr(owner, name), seconds, part))
    try:
        yield seconds
    finally:
        for _, owner, name in calls:
            delattr(owner, name)  # the class's is back


def _timed(function: Callable, seconds: dict[str, float], part: str) -> Callable:
    def run(*args: Any, **keys: Any) -> Any:
        began = _now()
        try:
            return function(*args, **keys)
        finally:
            seconds[part] += _now() - began

    return run


def _now() -> float:
    """Seconds on the wall, which ``data_time`` has too and a run takes, when what was given to the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _forget_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
