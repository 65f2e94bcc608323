"""Hooks of DistillTrainer beyond detectron2's."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, get_event_storage
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..duration import spoken
from ..random_state import random_state, set_random_state
from .best import BestCheckpoint
from .interrupt import Interrupted
from .run_log import shorten_screen

logger = logging.getLogger(__name__)


class _AfterPretraining(HookBase):
    """Mixed into a hook of the student, which does nothing while only losses are trained.

    The hooks keep detectron2's names, which are keys in checkpoints.
    """

    def after_step(self) -> None:
        if not self.trainer.pretraining:
            super().after_step()


class LRScheduler(_AfterPretraining, hooks.LRScheduler):
    """detectron2's, for the student."""


class PreciseBN(_AfterPretraining, hooks.PreciseBN):
    """detectron2's, which measures on the same images each time and leaves the random state, as a resumed run
    must."""

    def update_stats(self) -> None:
        state = random_state()
        self._data_iter = None
        with self.trainer.average.applied():
            super().update_stats()
        set_random_state(state)


class MeasuredWeights(HookBase):
    """Before each step. The first hook, so that its time is none of the step's."""

    def __init__(self, measure: Callable[[], None]):
        self._measure = measure

    def before_step(self) -> None:
        self._measure()


class EvalHook(_AfterPretraining, hooks.EvalHook):
    """detectron2's, which a resumed run can ask for the evaluation that a kill has cut off."""

    def __init__(self, period: int, evaluate: Callable[[], Any], best: BestCheckpoint):
        """
        Args:
            best: told of the results.
        """
        super().__init__(period, evaluate)
        self._best = best

    def is_due(self, iteration: int) -> bool:
        """Whether an evaluation follows this iteration, other than that at the end of the training."""
        ends = iteration + 1
        if ends <= self.trainer.loss_training.pretrain_iters or ends == self.trainer.max_iter:
            return False
        return self._period > 0 and ends % self._period == 0

    def evaluate(self) -> None:
        """Evaluate now; the results are scalars of the storage's iteration."""
        self._do_eval()

    def _do_eval(self) -> None:
        super()._do_eval()
        self._best.note(self.trainer.last_results)


class Writers(hooks.PeriodicWriter):
    """detectron2's, whose files are opened only when the training begins. They write after each evaluation, too,
    because they know only the last one."""

    def __init__(self, build: Callable[[], list[EventWriter]], period: int, evaluation: EvalHook):
        super().__init__([], period)
        self._build = build
        self._evaluation = evaluation

    def before_train(self) -> None:
        self._writers = self._build()

    def after_step(self) -> None:
        self.complete(self.trainer.iter)

    def complete(self, iteration: int) -> None:
        """Write what is due after this iteration and not written yet."""
        ends = iteration + 1
        if (
            ends % self._period == 0
            or ends == self.trainer.max_iter
            or self._evaluation.is_due(iteration)
        ):
            for writer in self._writers:
                writer.write()


class Checkpoints(HookBase):
    """Save every ``period`` iterations and at the end, on all processes together.

    All take part because each contributes its random state; the main one writes. Losses are
    flushed first, so that no checkpoint holds the result of a non-finite loss.
    """

    def __init__(self, period: int):
        self.period = period

    def after_step(self) -> None:
        trainer = self.trainer
        if trainer.iter + 1 >= trainer.max_iter:
            trainer.save("model_final")
        elif self.period > 0 and (trainer.iter + 1) % self.period == 0:
            trainer.save(f"model_{trainer.iter:07d}")


class StopOnRequest(HookBase):
    """Save and leave when a process was asked to stop."""

    def before_step(self) -> None:
        self.trainer.note_stop_request()

    def after_step(self) -> None:
        if self.trainer.stop_agreed and self.trainer.iter + 1 < self.trainer.max_iter:
            self.trainer.save(f"model_{self.trainer.iter:07d}")
            raise Interrupted


class ExpectedDuration(HookBase):
    """One line, after the first iterations of a longer run, on how long it will take."""

    WARM_UP, MEASURED = 5, 15

    def before_train(self) -> None:
        self._first = self.trainer.start_iter + self.WARM_UP
        self._began = 0.0

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done == self._first:
            self._began = time.perf_counter()
        left = self.trainer.max_iter - done
        if done == self._first + self.MEASURED and left > self.WARM_UP + self.MEASURED:
            seconds = (time.perf_counter() - self._began) / self.MEASURED
            logger.info(
                f"Expected duration: {spoken(left * seconds)} for {left} more iterations of {seconds:.2g} s, "
                "without evaluations"
            )


class BoundedHistories(HookBase):
    """Forget old values of detectron2's history of each scalar, which grows without end otherwise.

    The estimate of the remaining time reads most, the last 1000.
    """

    KEPT = 1000

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self.KEPT:
            return
        for history in get_event_storage().histories().values():
            del history.values()[: -self.KEPT]


class ProgressBar(HookBase):
    """A bar with the remaining time, on a terminal; log lines appear above it."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._bar: tqdm | None = None

    @staticmethod
    def is_enabled() -> bool:
        return comm.is_main_process() and sys.stderr.isatty()

    def before_train(self) -> None:
        loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "distill_d2")]
        self._stack.enter_context(logging_redirect_tqdm(loggers))
        shorten_screen()  # the handlers are new
        self._bar = self._stack.enter_context(
            tqdm(total=self.trainer.max_iter, initial=self.trainer.start_iter, unit="it")
        )

    def after_step(self) -> None:
        assert self._bar is not None  # before_train made it
        history = get_event_storage().histories().get("total_loss")
        if history is not None:
            self._bar.set_postfix(loss=f"{history.latest():.3g}", refresh=False)
        self._bar.update()

    def after_train(self) -> None:
        self._stack.close()
