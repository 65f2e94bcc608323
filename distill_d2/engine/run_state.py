"""What a run needs beyond weights and optimizers to continue as if it had not stopped."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn

from ..data import ResumableTrainingSampler
from ..distiller import Distiller
from ..distiller.phases import measured_weights
from ..random_state import set_random_state
from .changes import changes, settings_of_run
from .ema import AveragedWeights
from .process_state import ProcessState

logger = logging.getLogger(__name__)


class RunState:
    """The order of images, the state of each process, and the settings to compare with those of a resumed run."""

    def __init__(
        self,
        cfg: CfgNode | DictConfig,
        model: nn.Module,
        student: nn.Module,
        loader: Any,
        average: AveragedWeights,
    ):
        """
        Args:
            model: before the first step, with all buffers.
            student: the detector in it.
            loader: of the training.
            average: of the student's weights.
        """
        self._samplers = {"train": _find_sampler(loader)}
        images = getattr(loader, "images", "")
        self._settings = settings_of_run(cfg, comm.get_world_size(), images)
        self._saved_settings: dict[str, str] | None = None
        self._measured_weights = measured_weights(model.losses) if isinstance(model, Distiller) else []
        self._process_state = ProcessState(model, student, average)
        self._processes: list[dict[str, Any]] = []
        self._random_state: dict[str, Any] | None = None

    def add_loader(self, name: str, loader: Any) -> None:
        """Let another loader keep its order of images, too."""
        self._samplers[name] = _find_sampler(loader)

    def gather(self) -> None:
        """Take the state of all processes, for ``state_dict``; all call it together."""
        self._processes = self._process_state.gather()

    def state_dict(self) -> dict[str, Any]:
        """Entries of the trainer's own state."""
        seeds = {name: sampler.seed for name, sampler in self._samplers.items() if sampler is not None}
        return {"processes": self._processes, "run": self._settings, "sampler_seeds": seeds}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take what ``state_dict`` gave; ``restore`` and ``restore_random_state`` follow."""
        self._processes = state_dict.get("processes", [])
        self._saved_settings = state_dict.get("run")
        for name, seed in state_dict.get("sampler_seeds", {}).items():
            sampler = self._samplers.get(name)
            if sampler is not None:
                sampler.seed = seed

    def restore(self, iteration: int, batches: int) -> None:
        """Continue the order of images, restore each process's own state, and tell what has changed.

        To be called when the model and the losses are loaded, which are process 0's. Another number of processes
        goes on with its state, and with new random numbers.

        Args:
            iteration: the first that is trained now.
            batches: of the loader that were trained on before.
        """
        self._tell_changes(iteration)
        if len(self._processes) == comm.get_world_size():
            state = self._processes[comm.get_rank()]
            self._process_state.restore(state)
            self._random_state = state["random"]
        elif self._processes:
            self._process_state.restore(self._processes[0])
        sampler = self._samplers["train"]
        if sampler is not None:
            sampler.skip_batches(batches)
            return
        logger.warning(
            "--resume: the data loader is not one of distill_d2's, so the images come in a new order, unlike in "
            "the uninterrupted run"
        )

    def restore_random_state(self) -> None:
        """Right before the first step."""
        if self._random_state is not None:
            set_random_state(self._random_state)

    def _tell_changes(self, iteration: int) -> None:
        if self._saved_settings is None:
            logger.warning(
                "--resume: the checkpoint, of another version or trainer, has no settings and no random state: "
                "changes are not noticed, and random numbers are new"
            )
            return
        for line in changes(self._saved_settings, self._settings, iteration, self._measured_weights):
            logger.warning(line)


def _find_sampler(loader: Any) -> ResumableTrainingSampler | None:
    while loader is not None:
        sampler = getattr(loader, "sampler", None)
        if isinstance(sampler, ResumableTrainingSampler):
            return sampler
        loader = getattr(loader, "dataset", None)
    return None
