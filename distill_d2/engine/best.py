"""The best student by a metric of its evaluations, and the end of a run that does not improve any more."""

from __future__ import annotations

import difflib
import logging
import math
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from ..checkpoint import read_checkpoint
from ..messages import shortened
from ..run_files import BEST
from .settings import RunSettings

logger = logging.getLogger(__name__)


class EndedEarly(BaseException):
    """The run has not improved for TEST.PATIENCE evaluations; its last checkpoint is saved.

    Not an Exception, so that nothing logs it as a failure.
    """


class BestCheckpoint(HookBase):
    """Writes the student after each evaluation that is better than all before, and counts the others.

    The file itself says how good it is, so it is never replaced by a worse one, whatever was interrupted between.
    The count comes from the run's evaluations alone, as in the uninterrupted run.
    """

    def __init__(self, settings: RunSettings):
        self._metric = metric_in_results(settings.keep_best, settings.test_datasets)
        self._datasets = list(settings.test_datasets)
        self._patience = settings.patience
        self._path = os.path.join(settings.output_dir, BEST)
        self._written = -math.inf
        self._values: dict[int, float] = {}

    @property
    def metric(self) -> str:
        """Its name in the results, and in metrics.json."""
        return self._metric

    def continue_from(self, values: Mapping[int, float]) -> None:
        """Go on with a run. All processes call it together.

        Args:
            values: of the metric, by iteration; those of the main process count.
        """
        if not self._metric:
            return
        self._values = dict(comm.all_gather(dict(values))[0])
        if comm.is_main_process() and os.path.isfile(self._path):
            self._written = self._value_of_file()

    def note(self, results: Mapping[str, Any] | None) -> None:
        """Take the results of an evaluation, which other processes than the main one do not have. Nothing happens
        without TEST.KEEP_BEST.

        Raises:
            ValueError: the metric is not one of them.
        """
        if not self._metric:
            return
        value, problem = comm.all_gather(self._value_of(results))[0]
        if problem:
            raise ValueError(problem)
        iteration = min(self.trainer.iter, self.trainer.max_iter - 1)
        self._values[iteration] = value
        if comm.is_main_process() and value > self._written:
            self._written = value
            logger.info(f"{self._metric} {value:.4g} is the best so far")
            best = {"metric": self._metric, "value": value, "iteration": iteration}
            self.trainer.save_student(BEST, best={**best, "datasets": self._datasets})

    def after_step(self) -> None:
        if self.trainer.iter + 1 < self.trainer.max_iter:
            self.end_if_patient_enough()

    def end_resumed(self) -> None:
        """Before the first step of a resumed run: the same, after the last iteration of its checkpoint."""
        trainer = self.trainer
        if 0 < trainer.start_iter < trainer.max_iter:
            trainer.iter = trainer.storage.iter = trainer.start_iter - 1
            self.end_if_patient_enough()
            trainer.iter = trainer.storage.iter = trainer.start_iter

    def end_if_patient_enough(self) -> None:
        """Save the last checkpoint and raise EndedEarly, if so many evaluations brought nothing better."""
        count = without_improvement(self._values)
        if not self._patience or count < self._patience:
            return
        logger.info(
            f"{count} evaluations without a better {self._metric} (TEST.PATIENCE {self._patience}): the run ends "
            f"after iteration {self.trainer.iter}"
        )
        self.trainer.save("model_final")
        raise EndedEarly

    def after_train(self) -> None:
        if not comm.is_main_process() or not self._values:
            return
        if self._written == -math.inf:
            logger.warning(f"No evaluation gave a finite {self._metric}, so there is no {self._path}")
        else:
            logger.info(f"The best {self._metric} is {self._written:.4g}, of {self._path}")

    def _value_of(self, results: Mapping[str, Any] | None) -> tuple[float, str]:
        """The metric's value; what is wrong, "" for nothing."""
        if not comm.is_main_process():
            return math.nan, ""
        found = flatten_results_dict(results or {})
        if self._metric not in found:
            return math.nan, _unknown(self._metric, found)
        return float(found[self._metric]), ""

    def _value_of_file(self) -> float:
        """How good the best student so far is; minus infinity if that is another metric."""
        try:
            best = read_checkpoint(self._path)["metadata"]["best"]
            same = (best["metric"], best["datasets"]) == (self._metric, self._datasets)
            if same:
                return float(best["value"])
            problem = f"it is the best by {best['metric']} on {best['datasets']}"
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = str(error)
        logger.warning(f"{self._path} will be replaced: {problem}")
        return -math.inf


def without_improvement(values: Mapping[int, float]) -> int:
    """The evaluations since the best one; 0 while none is finite.

    Args:
        values: by iteration; one that is not finite is no improvement.
    """
    count, best = 0, -math.inf
    for _, value in sorted(values.items()):
        if value > best:
            best, count = value, 0
        elif best > -math.inf:
            count += 1
    return count


def metric_in_results(metric: str, datasets: Sequence[str]) -> str:
    """TEST.KEEP_BEST as results name it: with the dataset's name only where there are several."""
    one = f"{datasets[0]}/" if len(datasets) == 1 else ""
    return metric[len(one) :] if one and metric.startswith(one) else metric


def check_metric(metric: str, known: Mapping[str, Collection[str]]) -> None:
    """Check TEST.KEEP_BEST against what the evaluators return.

    Args:
        metric: "" is always right.
        known: the metrics of each test dataset's evaluator, such as "bbox/AP"; empty: not known.

    Raises:
        ValueError: none of them returns it; the message lists what they return.
    """
    if not metric or not all(known.values()):
        return
    datasets = list(known)
    if len(datasets) == 1:
        found = known[datasets[0]]
    else:
        found = [f"{name}/{one}" for name in datasets for one in known[name]]
    if metric_in_results(metric, datasets) not in found:
        raise ValueError(_unknown(metric, found))


def _unknown(metric: str, found: Collection[str]) -> str:
    close = difflib.get_close_matches(metric, found, n=1)
    advice = f"; the closest is {close[0]!r}" if close else ""
    listed = shortened(str(sorted(found)), 300)
    key = "TEST.KEEP_BEST (train.keep_best)"
    return f"{key} is {metric!r}; expected one of the evaluation's results {listed}{advice}"
