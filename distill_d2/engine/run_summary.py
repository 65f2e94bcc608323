"""What a user wants to know of a run before its first iteration, and after its last."""

from __future__ import annotations

import logging
import os
import platform
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from .. import __version__
from ..checkpoint.initial import initial_weights
from ..data import ShieldedLoader
from ..run_files import BEST, STUDENT_FILE
from .settings import RunSettings

logger = logging.getLogger("distill_d2")

_METRICS = ("AP", "AP50")


def log_environment(config_file: str, folder: str) -> None:
    """One line on the machine and one on the files."""
    logger.info(
        f"distill_d2 {__version__}, detectron2 {detectron2.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}; {_devices()}; processes: {comm.get_world_size()}"
    )
    source = f"Config: {config_file}. " if config_file else ""
    logger.info(f"{source}What is not shown here is in {os.path.join(folder, 'log.txt')}")


def _devices() -> str:
    if not torch.cuda.is_available():
        return f"CPU, threads: {torch.get_num_threads()}"
    names = Counter(map(torch.cuda.get_device_name, range(torch.cuda.device_count())))
    return ", ".join(f"{count} x {name}" for name, count in names.items())


def log_student(
    model: nn.Module, settings: RunSettings, start_iter: int = 0, weights: str | None = None
) -> None:
    """One line on the model and its weights.

    Args:
        start_iter: the first iteration; above 0 the run is resumed.
        weights: what was loaded; None: what the settings say.
    """
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    loaded = settings.weights if weights is None else weights
    own = "".join(f", but for the backbone's, {name}" for name in initial_weights(model))
    source = f"weights {loaded}" if loaded else f"random weights{own}"
    if start_iter:
        source = f"resumed from {settings.output_dir} after iteration {start_iter - 1}"
    logger.info(f"Student: {type(model).__name__}, {millions:.3g} M parameters, {source}")


def log_schedule(cfg: Any, start: int, end: int, loader: Any) -> None:
    """One line on the length of a training, with its evaluations and checkpoints.

    Args:
        start, end: the first iteration, and the one after the last.
        loader: of the training.
    """
    if start >= end:  # nothing is left, as the resume says
        return
    settings = RunSettings.from_config(cfg)
    evaluation = "no evaluation"
    if settings.test_datasets or (not isinstance(cfg, CfgNode) and "evaluator" in cfg.dataloader):
        evaluation = f"evaluation {_times(settings.eval_period)}"
    else:
        logger.warning(
            "DATASETS.TEST is empty: nothing is evaluated, neither in this training nor after it"
        )
    checkpoints = f"checkpoints in {settings.output_dir} {_times(settings.checkpoint_period)}"
    epochs = _epochs(loader, end, settings.accumulate)
    logger.info(f"Training: iterations {start} to {end - 1}{epochs}; {evaluation}; {checkpoints}")


def _times(period: int) -> str:
    return f"every {period} iterations and at the end" if period else "at the end"


def _epochs(loader: Any, iterations: int, accumulate: int) -> str:
    """Of one of our loaders, ``accumulate`` of whose batches make a step, the batch size and the number of
    epochs."""
    stream: Any = getattr(loader, "dataset", None)
    if not isinstance(loader, ShieldedLoader) or not loader.loader.batch_size:
        return ""
    batch = loader.loader.batch_size * accumulate * comm.get_world_size()
    images = len(stream.dataset)
    return f" of {batch} images, {iterations * batch / images:.3g} epochs of {images}"


def log_end(results: Mapping[str, Any] | None, settings: RunSettings, config_file: str) -> None:
    """The results of a training, where its detector is, and what to do next."""
    log_results(results or {}, settings)
    folder = settings.output_dir
    best, last = os.path.join(folder, BEST), os.path.join(folder, "model_final.pth")
    weights = best if os.path.isfile(best) else last
    on_cpu = "--num-gpus 0 " if settings.device == "cpu" else ""
    if config_file.endswith(".py"):
        evaluate = f"{shlex.quote(config_file)} {shlex.quote(f'train.init_checkpoint={weights}')}"
    else:
        config = os.path.join(folder, STUDENT_FILE)
        evaluate = f"{shlex.quote(config)} MODEL.WEIGHTS {shlex.quote(weights)}"
    commands = [f"evaluate {on_cpu}--config-file {evaluate}"]
    if not config_file.endswith(".py"):
        commands.append(f"predict --run {shlex.quote(folder)} IMAGE ... --output pictures")
    commands.append(f"report {shlex.quote(folder)}")
    lines = "".join(f"\n  distill-d2 {command}" for command in commands)
    logger.info(f"The trained detector is in {weights}. Next:{lines}")


def log_results(results: Mapping[str, Any], settings: RunSettings) -> None:
    """A line per dataset and task of an evaluation's results, such as "cells_val bbox: AP 24.4, AP50 61.2"."""
    tested = settings.test_datasets  # of several, the results are by name
    for line in _result_lines(results, tested[0] if len(tested) == 1 else ""):
        logger.info(f"Result: {line}")


def _result_lines(results: Mapping[str, Any], name: str = "") -> Iterator[str]:
    numbers = [f"{key} {results[key]:.1f}" for key in _METRICS if isinstance(results.get(key), Real)]
    if numbers:
        yield f"{name}: {', '.join(numbers)}"
    for key, inner in results.items():
        if isinstance(inner, Mapping):
            yield from _result_lines(inner, f"{name} {key}".strip())
