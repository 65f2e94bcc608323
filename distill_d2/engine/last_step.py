"""The end of the step that wrote a checkpoint: an evaluation, a line in metrics.json; a kill may cut them off."""

from __future__ import annotations

import logging
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm

from .hooks import EvalHook, Writers
from .metrics import logged_values, mend, names_at, recent_scalars, restore_scalars

logger = logging.getLogger(__name__)


class LastStep(HookBase):
    """Does in a resumed run what follows the checkpoint in its iteration, as far as the run did not come to it.

    Its state is the scalars behind metrics.json. It is the last hook, because it uses others.
    """

    def __init__(self) -> None:
        self._scalars: dict[str, Any] = {}
        self._folder = ""
        self._evaluation_missing = False

    def state_dict(self) -> dict[str, Any]:
        if not hasattr(self.trainer, "storage"):  # before the training
            return {}
        return {"scalars": recent_scalars(self.trainer.storage)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._scalars = state_dict["scalars"]

    def continue_metrics(self, folder: str, last: int) -> None:
        """Drop what metrics.json holds after the checkpoint, and see whether it lacks an evaluation of the
        checkpoint's iteration. All processes call it together, after the checkpoint is loaded."""
        self._folder = folder
        missing = False
        if comm.is_main_process():
            logged = mend(folder, last)
            # The line of a stopped run has the end of its step and an estimate, but no evaluation.
            missing = not logged - names_at(self._scalars, last) - {"iteration", "eta_seconds"}
        self._evaluation_missing = comm.all_gather(missing)[0]

    def logged(self, name: str) -> dict[int, float]:
        """The values of a scalar in the run so far, by iteration, after ``continue_metrics``."""
        recent = self._scalars[name]["values"] if name in self._scalars else []
        return {**logged_values(self._folder, name), **{when: value for value, when in recent}}

    def before_train(self) -> None:
        trainer, last = self.trainer, self.trainer.start_iter - 1
        if last < 0:
            return
        trainer.iter = trainer.storage.iter = last
        restore_scalars(trainer.storage, self._scalars)
        for hook in trainer._hooks:
            if isinstance(hook, EvalHook) and hook.is_due(last) and self._evaluation_missing:
                logger.info(
                    f"The evaluation after iteration {last} is missing in metrics.json; it follows"
                )
                hook.evaluate()
            elif isinstance(hook, Writers):
                hook.complete(last)
        trainer.iter = trainer.storage.iter = trainer.start_iter
