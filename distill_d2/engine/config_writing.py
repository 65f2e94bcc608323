"""The config files that a run leaves in OUTPUT_DIR.

``config.yaml`` describes the student alone, for inference, evaluation and export. ``distill_config.yaml``, of a
distillation, describes the whole run, to resume it from any folder.
"""

from __future__ import annotations

import os
from typing import Any

from detectron2.config import CfgNode, get_cfg

from ..checkpoint import write_whole
from ..config import EXTRA_KEY, add_distill_config, dump, student_config
from ..data import with_absolute_paths
from ..run_files import DISTILLATION_FILE, STUDENT_FILE

_OF_TRAINING = ("WANDB", "MLFLOW")

_STUDENT_COMMENT = """\
# The student of this run. For inference, MODEL.WEIGHTS is this folder's model_final.pth.
"""
_DISTILLATION_COMMENT = f"""\
# The whole run, for --resume. {STUDENT_FILE} beside it describes the student alone.
"""


def write_configs(cfg: CfgNode, train: bool) -> None:
    """Write the config files of a run to its OUTPUT_DIR.

    Args:
        train: it trains; then the distill_config.yaml of an earlier run does not stay.
    """
    _write(cfg.OUTPUT_DIR, STUDENT_FILE, _STUDENT_COMMENT + plain_student_config(cfg).dump())
    if cfg.MODEL.META_ARCHITECTURE == "Distiller":
        _write(
            cfg.OUTPUT_DIR, DISTILLATION_FILE, _DISTILLATION_COMMENT + dump(_with_absolute_paths(cfg))
        )
    elif train and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, DISTILLATION_FILE)):
        os.remove(os.path.join(cfg.OUTPUT_DIR, DISTILLATION_FILE))


def plain_student_config(cfg: CfgNode) -> CfgNode:
    """The student's config without what only distillation reads, and without keys that detectron2 lacks where
    they have their default values: if none is left, plain detectron2 loads it."""
    cfg = student_config(cfg)
    del cfg.MODEL["DISTILLER"], cfg[EXTRA_KEY]
    del cfg.MODEL["FAST_KERNELS"]
    for name in _OF_TRAINING:
        del cfg[name]
    defaults = get_cfg()
    add_distill_config(defaults)
    _drop_defaults(cfg, defaults, get_cfg())
    return cfg


def check_is_no_student_config(config_file: str) -> None:
    """Raises ValueError for the config.yaml of a distillation, which has lost the teacher and the losses."""
    folder, name = os.path.split(config_file)
    whole = os.path.join(folder, DISTILLATION_FILE)
    if name == STUDENT_FILE and os.path.isfile(whole):
        raise ValueError(
            f"--config-file '{config_file}' describes a student alone; to distill, take '{whole}'"
        )


def _write(folder: str, name: str, text: str) -> None:
    write_whole(os.path.join(folder, name), lambda file: file.write(text.encode()))


def _drop_defaults(node: CfgNode, defaults: CfgNode, known: CfgNode) -> None:
    for name, value in list(node.items()):
        if name not in known:
            if name in defaults and value == defaults[name]:
                del node[name]
        elif isinstance(value, CfgNode):
            _drop_defaults(value, defaults[name], known[name])


def _with_absolute_paths(cfg: CfgNode) -> CfgNode:
    """A copy whose paths are those of the current folder, so that it means the same in any other."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = os.path.abspath(cfg.OUTPUT_DIR)
    cfg.MODEL.WEIGHTS = _absolute(cfg.MODEL.WEIGHTS)
    for name in ("TEACHER_WEIGHTS", "PRELOAD_TEACHER"):
        cfg.MODEL.DISTILLER[name] = _absolute(cfg.MODEL.DISTILLER[name])
    for name in ("PROPOSAL_FILES_TRAIN", "PROPOSAL_FILES_TEST"):
        cfg.DATASETS[name] = tuple(map(_absolute, cfg.DATASETS[name]))
    cfg.DATASETS.CUSTOM = [with_absolute_paths(entry) for entry in cfg.DATASETS.CUSTOM]
    return cfg


def _absolute(path: Any) -> Any:
    """Of a file that exists; addresses, and names of files elsewhere, stay."""
    return os.path.abspath(path) if isinstance(path, str) and os.path.isfile(path) else path
