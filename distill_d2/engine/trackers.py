"""Metrics of a run in Weights & Biases and in MLflow, where these are installed and asked for."""

from __future__ import annotations

import importlib
import os
from collections import defaultdict
from typing import Any, Callable

from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage

from ..checkpoint import write_whole
from .metrics import WINDOW, last_iteration


def check_trackers(cfg: CfgNode) -> None:
    """Raises ImportError if a tracker that the config asks for is not installed."""
    for key, package in (("WANDB", "wandb"), ("MLFLOW", "mlflow")):
        if cfg[key].ENABLED:
            _import(key, package)


def build_trackers(cfg: Any, folder: str) -> list[EventWriter]:
    """The writers that the nodes WANDB and MLFLOW ask for.

    Args:
        cfg: of the whole run; its values are noted as the run's parameters.
        folder: OUTPUT_DIR; a resumed run continues the tracker's run, whose id is kept there.

    Raises:
        ValueError: the tracker does not start.
    """
    if not isinstance(cfg, CfgNode):  # a LazyConfig has no such nodes
        return []
    kinds: dict[str, Callable[..., EventWriter]] = {"WANDB": WandbWriter, "MLFLOW": MlflowWriter}
    return [_start(key, kind, cfg, folder) for key, kind in kinds.items() if cfg[key].ENABLED]


def _start(key: str, kind: Callable[..., EventWriter], cfg: CfgNode, folder: str) -> EventWriter:
    try:
        return kind(cfg, folder)
    except Exception as error:  # of its client or its server
        raise ValueError(
            f"{key}.ENABLED is True, but no run can be started there: {error}. Mend its settings, or set "
            f"{key}.ENABLED to False"
        ) from error


class _Tracker(EventWriter):
    """Sends each scalar once. The id of the tracker's run is in the file ``note`` of OUTPUT_DIR."""

    note: str

    def __init__(self, folder: str):
        self._path = os.path.join(folder, self.note)
        self._last_write = last_iteration(folder)

    def write(self) -> None:
        lines: dict[int, dict[str, float]] = defaultdict(dict)
        for name, (value, iteration) in get_event_storage().latest_with_smoothing_hint(WINDOW).items():
            if iteration > self._last_write:
                lines[iteration][name] = float(value)
        for iteration, scalars in sorted(lines.items()):
            self.send(scalars, iteration)
            self._last_write = iteration

    def send(self, scalars: dict[str, float], iteration: int) -> None:
        raise NotImplementedError

    def known_id(self) -> str | None:
        """The id of the tracker's run that this run continues."""
        if not os.path.isfile(self._path):
            return None
        with open(self._path, encoding="utf-8") as file:
            return file.read().strip() or None

    def keep_id(self, run_id: str) -> None:
        write_whole(self._path, lambda file: file.write(f"{run_id}\n".encode()))


class WandbWriter(_Tracker):
    """To Weights & Biases; its environment variables (WANDB_MODE, WANDB_ENTITY, ...) hold."""

    note = "wandb_id.txt"

    def __init__(self, cfg: CfgNode, folder: str):
        super().__init__(folder)
        wandb = _import("WANDB", "wandb")
        self._run = wandb.init(
            project=cfg.WANDB.PROJECT,
            name=cfg.WANDB.NAME or _name(folder),
            id=self.known_id(),
            resume="allow",
            dir=folder,
            config=_plain(cfg),
        )
        self.keep_id(self._run.id)

    def send(self, scalars: dict[str, float], iteration: int) -> None:
        self._run.log(scalars, step=iteration)

    def close(self) -> None:
        self._run.finish()


class MlflowWriter(_Tracker):
    """To MLflow; without MLFLOW.TRACKING_URI where its environment variable says, or its default."""

    note = "mlflow_id.txt"

    def __init__(self, cfg: CfgNode, folder: str):
        super().__init__(folder)
        self._mlflow = _import("MLFLOW", "mlflow")
        if cfg.MLFLOW.TRACKING_URI:
            self._mlflow.set_tracking_uri(cfg.MLFLOW.TRACKING_URI)
        self._mlflow.set_experiment(cfg.MLFLOW.EXPERIMENT)
        run = self._mlflow.start_run(run_id=self.known_id(), run_name=cfg.MLFLOW.NAME or _name(folder))
        self.keep_id(run.info.run_id)
        self._mlflow.log_text(cfg.dump(), "config.yaml")

    def send(self, scalars: dict[str, float], iteration: int) -> None:
        # A slash makes groups; MLflow refuses other signs in names.
        named = {_allowed(name): value for name, value in scalars.items()}
        self._mlflow.log_metrics(named, step=iteration)

    def close(self) -> None:
        self._mlflow.end_run()


def _import(key: str, package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"{key}.ENABLED is True, but the package {package} cannot be imported: {error}. "
            f"`pip install {package}` installs it"
        ) from error


def _name(folder: str) -> str:
    return os.path.basename(os.path.abspath(folder))


def _allowed(name: str) -> str:
    return "".join(sign if sign.isalnum() or sign in "_-./ " else "_" for sign in name)


def _plain(node: Any) -> Any:
    if isinstance(node, CfgNode):
        return {name: _plain(value) for name, value in node.items()}
    return node
