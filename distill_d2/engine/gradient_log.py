"""OUTPUT_DIR/gradients.jsonl: how strongly each term pulls on the student, over a distillation."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from detectron2.utils import comm
from torch import nn

from ..balance import gradient_table, unbalanced
from ..checkpoint import write_whole
from ..distiller import Distiller
from ..gradients import TermGradients, distills, term_gradients
from ..run_files import GRADIENTS
from .gradient_examples import gradient_examples
from .settings import RunSettings

logger = logging.getLogger(__name__)


class GradientLog:
    """Measures the terms' gradients on the same few images of the training data, at the start of a distillation
    and with each evaluation in it. The run itself stays as it is, bit for bit. Losses that are all off for the
    whole run are not measured.

    A line of the file has "iteration", the number of the student's iterations that are done; "terms", the value,
    the gradient and the loss of each one ("": the student's own); "task" and "losses", the gradients of all terms
    of the student and of each loss together; "weights", those of the losses. Numbers that are not finite are null.
    """

    def __init__(self, model: nn.Module, loader: Any, settings: RunSettings):
        """
        Args:
            model: not wrapped in DistributedDataParallel; without a Distiller nothing is measured.
            loader: of the training.
        """
        self._model: Any = model
        self._loader = loader
        self._settings = settings
        self._folder = settings.output_dir
        self._active = (
            isinstance(model, Distiller) and settings.distiller.MEASURE_GRADIENTS and distills(model)
        )

    def start(self) -> None:
        """Before the student's first step; log what was measured, and warn of losses that are much too weak or too
        strong.

        All processes call it together, and ``after``, because some detectors average over them.
        """
        measured = self._measure(None)
        if measured is None:
            return
        self._write(0, measured)
        logger.info(gradient_table(measured))
        for line in unbalanced(measured, self._model.losses):
            logger.warning(line)

    def after(self, steps: int) -> None:
        """After this number of training steps, those of pretraining included."""
        if not self._active:
            return
        iterations = steps - self._model.phases.pretrain_iters
        measured = self._measure(max(iterations - 1, 0))
        if measured is not None:
            self._write(iterations, measured)

    def _measure(self, iteration: int | None) -> TermGradients | None:
        if not self._active:
            return None
        try:
            with gradient_examples(self._loader, self._settings) as batches:
                if batches is not None:
                    return term_gradients(self._model, *batches, iteration=iteration)
            reason = "the data loader is not one of distill_d2's"
        except FloatingPointError:  # of detectron2's RPN, in all processes; the next step tells more
            return None
        except torch.cuda.OutOfMemoryError:
            if comm.get_world_size() > 1:  # the others may wait for this process
                raise
            reason = "the GPU has too little memory"
        self._active = False
        logger.warning(f"The gradients of the losses' terms are not measured: {reason}")
        return None

    def _write(self, iterations: int, measured: TermGradients) -> None:
        """Add a line, in place of what a stopped run wrote of this iteration and of later ones."""
        if not comm.is_main_process():
            return
        lines = [line for line in read_gradients(self._folder) if line["iteration"] < iterations]
        terms = {name: _finite(asdict(term)) for name, term in measured.terms.items()}
        line = {"iteration": iterations, "terms": terms, "task": measured.task}
        weights = {name: float(loss.applied_weight) for name, loss in self._model.losses.items()}
        lines.append({**_finite(line), "losses": _finite(measured.losses), "weights": weights})
        content = "".join(f"{json.dumps(line)}\n" for line in lines)
        path = os.path.join(self._folder, GRADIENTS)
        write_whole(path, lambda file: file.write(content.encode()))


def read_gradients(folder: str) -> list[dict[str, Any]]:
    """The lines of a run's gradients.jsonl; none where there is no such file."""
    path = os.path.join(folder, GRADIENTS)
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    broken = [
        key for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)
    ]
    return {**values, **dict.fromkeys(broken)}
