"""Find, build, load and verify a teacher."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2 import model_zoo as detectron2_zoo
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.modeling import build_model
from omegaconf import OmegaConf
from torch import nn

from .. import model_zoo
from ..checkpoint import SafeCheckpointer
from ..config import add_distill_config, load_yaml, student_config
from ..data.classes import classes_in, classes_of, classes_of_config
from ..freeze import compile_patterns
from ..lazy_config import load_lazy_config
from ..rules import assertions_told, check_model
from .cache import CacheSettings
from .running import Teacher

logger = logging.getLogger(__name__)

# Keys that never change what a detector computes: normalization constants and anchors, which come
# from the config, and batch normalization's step counter, which evaluation does not use.
_NEUTRAL_KEYS = (r"(^|\.)pixel_(mean|std)$", r"anchor_generator\.cell_anchors", r"num_batches_tracked$")

_TEACHER_ADVICE = (
    "A teacher must be whole: give the weights that belong to the config (MODEL.DISTILLER.TEACHER_WEIGHTS), or "
    "excuse keys with regular expressions in MODEL.DISTILLER.TEACHER_ALLOW_MISSING"
)


def build_teacher(cfg: CfgNode) -> Teacher:
    """The teacher that MODEL.DISTILLER of a student's config describes; see ``load_teacher``."""
    return teacher_of(cfg.MODEL.DISTILLER, cfg.MODEL.DEVICE)


def teacher_of(distiller: CfgNode, device: str) -> Teacher:
    """The teacher that a MODEL.DISTILLER node describes; see ``load_teacher``."""
    return load_teacher(
        distiller.MODEL_DISTILLER_CONFIG,
        official=distiller.MODEL_LOAD_OFFICIAL,
        weights=distiller.TEACHER_WEIGHTS,
        allow_missing=distiller.TEACHER_ALLOW_MISSING,
        device=device,
        prepare=distiller.TEACHER_PREPARE,
        autocast=distiller.TEACHER_AUTOCAST,
        compile=distiller.TEACHER_COMPILE,
        cache=CacheSettings(
            distiller.TEACHER_CACHE, distiller.TEACHER_CACHE_GB, distiller.TEACHER_CACHE_HALF
        ),
    )


def load_teacher(
    config: str,
    *,
    official: bool = True,
    weights: str = "",
    allow_missing: Sequence[str] = (),
    device: str = "cpu",
    **options: Any,
) -> Teacher:
    """Build a teacher from a config's name or file, whole and frozen.

    Args:
        config: with ``official`` a name in detectron2's model zoo, whose published weights are used;
            otherwise a .yaml or .py (LazyConfig) file that names its own weights.
        weights: path or URL that replaces those of the config.
        allow_missing: regular expressions of checkpoint keys that need not fit.
        device: where to build it.
        options: prepare, autocast, compile, classes, cache of Teacher. Its classes are by default those of its
            checkpoint or of its config's training dataset, where they are known.

    Raises:
        FileNotFoundError: its config or weights do not exist.
        ValueError: its weights cannot be read, or do not fit the model (law 3).
    """
    plan = _plan(config, official)
    path = _find_weights(weights or plan.weights, plan)
    model = plan.build(device)
    loaded, extra = load_whole(model, path, allow_missing)
    options.setdefault("classes", classes_in(extra) or plan.classes())
    source = f"{plan.config_file}, {loaded} keys loaded from {path}"
    teacher = Teacher(model, input_format=plan.format_of(model), source=source, **options)
    teacher.check_device(torch.device(device))
    return teacher


def teacher_weights(distiller: CfgNode) -> str:
    """Path or address of the weights of the teacher that a MODEL.DISTILLER node describes.

    Raises:
        FileNotFoundError, ValueError: see ``load_teacher``.
    """
    plan = _plan(distiller.MODEL_DISTILLER_CONFIG, distiller.MODEL_LOAD_OFFICIAL)
    return _find_weights(distiller.TEACHER_WEIGHTS or plan.weights, plan)


def untrained_teacher(distiller: CfgNode, device: str) -> tuple[nn.Module, str]:
    """The model, with random weights, of the teacher that a MODEL.DISTILLER node describes, and its
    input format: for measurements, which need neither training nor a download."""
    plan = _plan(distiller.MODEL_DISTILLER_CONFIG, distiller.MODEL_LOAD_OFFICIAL)
    model = plan.build(device)
    return model, plan.format_of(model)


def load_teacher_weights(model: nn.Module, path: str, allow: Sequence[str] = ()) -> int:
    """Load ``path`` into ``model`` and check that every key fits; returns the number of keys loaded.

    Args:
        allow: regular expressions of keys that may be missing, unexpected or mis-shaped.

    Raises:
        ValueError: some key does not fit; the message lists them. A pattern is not valid.
    """
    return load_whole(model, path, allow)[0]


def load_whole(
    model: nn.Module,
    path: str,
    allow: Sequence[str] = (),
    what: str = "the teacher's weights",
    advice: str = _TEACHER_ADVICE,
) -> tuple[int, dict[str, Any]]:
    """``load_teacher_weights`` of any detector; also the checkpoint's entries besides the model.

    Args:
        what, advice: the beginning and the end of the message.
    """
    checkpointer = SafeCheckpointer(model)
    extra = checkpointer.load(path)
    keys = checkpointer.incompatible
    problems = {
        "missing in the file": keys.missing_keys,
        "not in the model": keys.unexpected_keys,
        "of another shape (file, model)": [f"{k} {a} {b}" for k, a, b in keys.incorrect_shapes],
    }
    allowed = compile_patterns((*_NEUTRAL_KEYS, *allow), "MODEL.DISTILLER.TEACHER_ALLOW_MISSING")
    problems = {
        kind: [name for name in names if not any(p.search(name.split(" ")[0]) for p in allowed)]
        for kind, names in problems.items()
    }
    mis_shaped = {key for key, _, _ in keys.incorrect_shapes}
    problems["missing in the file"] = [
        name for name in problems["missing in the file"] if name not in mis_shaped
    ]
    if any(problems.values()):
        raise ValueError(
            f"{what} '{path}' do not fit its config ({type(model).__name__}):\n"
            + "\n".join(_listing(kind, names) for kind, names in problems.items() if names)
            + f"\n{advice}"
        )
    return len(model.state_dict()) - len(set(keys.missing_keys)), extra


def _listing(kind: str, names: list[str], most: int = 10) -> str:
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return f"  {len(names)} keys {kind}: {', '.join(names[:most])}{more}"


@dataclass
class _Plan:
    """Where a teacher comes from, before it is built."""

    config_file: str
    config: Any
    weights: str
    input_format: str | None
    # Of the config and the files that it inherits from.
    folders: Sequence[str] = ()

    def build(self, device: str) -> nn.Module:
        if isinstance(self.config, CfgNode):
            config = student_config(self.config)
            config.MODEL.DEVICE = device
            check_model(config, f"the teacher's config '{self.config_file}'")
            with assertions_told(f"the teacher '{self.config_file}'"):
                return build_model(config)
        return instantiate(self.config.model).to(device)

    def classes(self) -> list[str] | None:
        """The classes of its training dataset, where that is known."""
        if isinstance(self.config, CfgNode):
            return classes_of_config(self.config)
        names = OmegaConf.select(self.config, "dataloader.train.dataset.names") or ()
        return classes_of([names] if isinstance(names, str) else list(names))

    def format_of(self, model: nn.Module) -> str:
        """Channel order of the input of ``model``, built from this plan."""
        return self.input_format or getattr(model, "input_format", None) or "BGR"


def _plan(name: str, official: bool) -> _Plan:
    if not name:
        raise ValueError(
            "MODEL.DISTILLER.MODEL_DISTILLER_CONFIG is empty; expected the config of the teacher"
        )
    path = _official_config(name) if official else model_zoo.find_config(name)
    config: Any
    if path.endswith(".py"):
        config = load_lazy_config(path, ["model"])
        logger.info(f"Ran the code of {path}, a LazyConfig")
        folders = [os.path.dirname(path)]
    else:
        config = get_cfg()
        add_distill_config(config)
        folders = load_yaml(config, path).folders
    weights, input_format = _weights_and_format(config)
    if official:
        return _Plan(name, config, _official_weights(name), input_format)
    return _Plan(path, config, weights, input_format, folders)


def in_official_zoo(name: str) -> bool:
    """Whether detectron2's model zoo has a config of this name."""
    folder = (Path(detectron2_zoo.__file__).parent / "configs").resolve()
    path = (folder / name).resolve()
    return folder in path.parents and path.is_file()


def _official_config(name: str) -> str:
    if not in_official_zoo(name):
        raise _unofficial(name, f"{name} not available in Model Zoo!")
    return str((Path(detectron2_zoo.__file__).parent / "configs" / name).resolve())


def _official_weights(name: str) -> str:
    try:
        return detectron2_zoo.model_zoo.get_checkpoint_url(name)
    except RuntimeError as error:
        raise _unofficial(name, str(error)) from error


def _unofficial(name: str, problem: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"MODEL.DISTILLER.MODEL_DISTILLER_CONFIG '{name}': {problem} With MODEL_LOAD_OFFICIAL True it must be a "
        "config of detectron2's model zoo with published weights, or a file of your own that exists; set "
        "MODEL.DISTILLER.MODEL_LOAD_OFFICIAL False to see where that is looked for"
    )


def _weights_and_format(config: Any) -> tuple[str, str | None]:
    if isinstance(config, CfgNode):
        return config.MODEL.WEIGHTS, config.INPUT.FORMAT
    train: dict[str, Any] = config.get("train", {})
    return train.get("init_checkpoint", ""), None


def _find_weights(weights: str, plan: _Plan) -> str:
    if not weights:
        raise ValueError(
            f"the teacher '{plan.config_file}' names no weights; set MODEL.WEIGHTS there (in a .py "
            "config train.init_checkpoint), or MODEL.DISTILLER.TEACHER_WEIGHTS"
        )
    if "://" in weights:
        return weights
    for folder in ("", *plan.folders):
        if os.path.isfile(os.path.join(folder, weights)):
            return os.path.join(folder, weights)
    places = dict.fromkeys([os.getcwd(), *map(os.path.abspath, plan.folders)])
    raise FileNotFoundError(
        f"the teacher's weights '{weights}' do not exist (looked in {', '.join(places)}); "
        "set MODEL.DISTILLER.TEACHER_WEIGHTS"
    )
