"""Where the config and the weights of a trained detector are."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.modeling import build_model
from omegaconf import DictConfig, OmegaConf
from torch import nn

from .. import model_zoo
from ..checkpoint import read_checkpoint, run_checkpoints
from ..checkpoint.choosing import choose
from ..config import add_distill_config, load_yaml, student_config
from ..config_values import set_values
from ..engine.config_writing import STUDENT_FILE
from ..lazy_config import load_lazy_config
from ..rules import assertions_told, check_model
from ..run_files import EXPECTED_RUN, check_run
from ..safe_yaml import read_yaml

#: Checkpoints of a finished run, the first that exists is taken.
PREFERRED = ("model_best.pth", "model_final.pth")

_MOST_LISTED = 8


@dataclass(frozen=True)
class Source:
    """A detector before it is built.

    Attributes:
        name: what names it, a path.
        config: of the detector alone, without a teacher.
        weights: path or address of its weights; "": none are named.
    """

    name: str
    config: CfgNode | DictConfig
    weights: str


def find_run(run: str, weights: str = "") -> Source:
    """The detector of a run. Neither its training data nor its teacher need exist.

    Args:
        run: the OUTPUT_DIR of a training; or a config, the path or packaged name of a .yaml or .py (LazyConfig,
            whose code is run), with weights; or one file that holds both, of `distill-d2 export`; or a
            checkpoint in an OUTPUT_DIR.
        weights: path or address of other weights than the run's own.

    Raises:
        FileNotFoundError, OSError, ValueError, KeyError: the message names the file or key.
    """
    check_run(run)
    path = os.path.expanduser(run)
    folder, name = os.path.split(path)
    if name == STUDENT_FILE and not weights and run_checkpoints(folder):
        path = folder
    if os.path.isdir(path):
        return _of_folder(path, weights)
    if path.endswith((".yaml", ".yml", ".py")):
        return _of_config(model_zoo.find_config(path), weights)
    return _of_file(path, weights)


def build_detector(source: Source, device: str = "cpu") -> nn.Module:
    """The model of a source, with random weights, in eval.

    Raises:
        ValueError, KeyError: the config describes no model that can be built; the message names the key.
    """
    config = source.config
    if isinstance(config, DictConfig):
        return instantiate(config.model).to(device).eval()
    config.MODEL.DEVICE = device
    check_model(config, f"the config of '{source.name}'")
    with assertions_told(f"the detector of '{source.name}'"):
        return build_model(config).eval()


def _of_folder(folder: str, weights: str) -> Source:
    file = os.path.join(folder, STUDENT_FILE)
    if _is_of_lazy_run(file):
        raise ValueError(
            f"the run '{folder}' was trained from a LazyConfig, which is code; give that .py file as the run and "
            f"the checkpoint, such as {os.path.join(folder, PREFERRED[-1])}, as the weights"
        )
    if not os.path.isfile(file):
        raise FileNotFoundError(
            f"the folder '{folder}' has no {STUDENT_FILE}; it holds {_listing(folder)}; {EXPECTED_RUN}"
        )
    return Source(folder, _read(file)[0], weights or _checkpoint_in(folder))


def _of_config(path: str, weights: str) -> Source:
    if path.endswith(".py"):
        config = load_lazy_config(path, ["model"])
        named = OmegaConf.select(config, "train.init_checkpoint", default="")
        config.model = config.model.get("student", config.model)  # of a whole Distiller
        folders: Sequence[str] = [os.path.dirname(path)]
    else:
        config, folders = _read(path)
        named = config.MODEL.WEIGHTS
    return Source(path, config, weights or _beside(named, folders))


def _of_file(path: str, weights: str) -> Source:
    text = read_checkpoint(path).get("config")
    if isinstance(text, str):
        return Source(path, _of_text(text, f"the config in '{path}'"), weights or path)
    beside = os.path.join(os.path.dirname(path), STUDENT_FILE)
    if not os.path.isfile(beside):
        raise ValueError(
            f"'{path}' holds weights without a config, and no {STUDENT_FILE} is beside it; give the config as the "
            "run and this file as the weights"
        )
    return Source(path, _read(beside)[0], weights or path)


def _read(path: str) -> tuple[CfgNode, list[str]]:
    """The student's config of a yaml file, and the folders of the file and those it inherits from."""
    config = _defaults()
    folders = load_yaml(config, path).folders
    return student_config(config), folders


def _of_text(text: str, source: str) -> CfgNode:
    config, values = _defaults(), read_yaml(text, source)
    if not isinstance(values, dict):
        raise ValueError(f"{source} has no keys; export the run again")
    set_values(config, values, lambda key: f"{source}: ")
    return student_config(config)


def _defaults() -> CfgNode:
    config = get_cfg()
    add_distill_config(config)
    return config


def _beside(weights: Any, folders: Sequence[str]) -> str:
    """A path from the current folder or from one of the config's; an address stays."""
    paths = [os.path.join(folder, weights) for folder in ("", *folders)] if weights else []
    return next(filter(os.path.isfile, paths), weights or "")


def _checkpoint_in(folder: str) -> str:
    paths = [os.path.join(folder, name) for name in PREFERRED]
    found = next(filter(os.path.isfile, paths), "")
    if found:
        return found
    choice = choose(folder, with_trainer=False)
    if not choice.path:
        reason = "; ".join(choice.problems) or f"it holds {_listing(folder)}"
        raise FileNotFoundError(
            f"the run '{folder}' has no whole checkpoint ({', '.join(PREFERRED)} or an earlier one): {reason}"
        )
    return choice.path


def _is_of_lazy_run(config_file: str) -> bool:
    if not os.path.isfile(config_file):
        return os.path.isfile(f"{config_file}.pkl")
    with open(config_file, encoding="utf-8", errors="replace") as file:
        return re.search(r"^\s*_target_:", file.read(), re.MULTILINE) is not None


def _listing(folder: str) -> str:
    names = sorted(os.listdir(folder))
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return f"{names[:_MOST_LISTED]}{more}" if names else "nothing"
