"""Read and check all of a run, up to its trainer before the first step; nothing is written."""

from __future__ import annotations

import argparse
import logging
import tempfile
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from omegaconf import DictConfig

from .. import plugins
from ..config_files import read_config
from ..data import skip_unreadable
from ..engine import DistillTrainer, RunSettings, lazy
from ..engine.epochs import in_iterations, lazy_in_iterations
from ..engine.key_rules import check_keys, check_lazy_keys
from ..engine.lazy_data import check_lazy_data
from ..engine.settings import micro_batch
from ..engine.setup import check_data as check_yaml_data
from ..engine.setup import log_without_effect, read_run_config
from ..imports import import_modules
from ..lazy_config import load_lazy_config
from ..losses import build_losses
from ..model_zoo import find_config
from ..pairs import pairs_of
from ..teacher import teacher_of
from .faults import Faults

logger = logging.getLogger(__name__)

_SEED = 1


def read(args: argparse.Namespace, faults: Faults) -> Any:
    """The config of a run, its values checked; None if it cannot be read.

    Args:
        args: of the command.
    """
    cfg: Any = None
    with faults.collected():
        import_modules(args.imports)
        plugins.detectors()
        distill = not args.baseline and _names_teacher(args)
        with faults.collected():
            cfg = _read(args, distill)
        if cfg is None and distill:  # without a teacher's config the rest can be checked
            cfg = _read(args, False)
    if isinstance(cfg, CfgNode):
        _check_yaml(cfg, faults)
    elif cfg is not None:
        with faults.collected():
            check_lazy_keys(cfg)
            lazy_in_iterations(cfg)
    return cfg


def _read(args: argparse.Namespace, distill: bool) -> CfgNode | DictConfig:
    if args.config_file.endswith(".py"):
        lazy_cfg = lazy.read_run_config(args, distill)
        lazy_cfg.train.device = args.device or lazy_cfg.train.device
        return lazy_cfg
    cfg = read_run_config(args, distill)
    cfg.MODEL.DEVICE = args.device or cfg.MODEL.DEVICE
    return cfg


def check_data(cfg: CfgNode | DictConfig, faults: Faults) -> None:
    """Check all datasets, as a training does."""
    with faults.collected():
        if not isinstance(cfg, CfgNode):
            check_lazy_data(cfg, lazy.student_of(cfg), told=faults.add)
            return
        check_yaml_data(cfg, DistillTrainer, told=faults.add)


def build_trainer(cfg: CfgNode | DictConfig, faults: Faults) -> DistillTrainer | None:
    """The trainer with its weights loaded, if nothing is wrong. With other faults, only the teacher is built."""
    settings = RunSettings.from_config(cfg)
    if not faults:
        with faults.collected():
            seed_all_rng(_SEED)
            trainer = (DistillTrainer if isinstance(cfg, CfgNode) else lazy.LazyDistillTrainer)(cfg)
            trainer.resume_or_load(resume=False)
            return trainer
    distills = (
        cfg.MODEL.META_ARCHITECTURE == "Distiller" if isinstance(cfg, CfgNode) else "distiller" in cfg
    )
    if distills:
        with faults.collected():
            teacher_of(settings.distiller, settings.device)
    return None


def _check_yaml(cfg: CfgNode, faults: Faults) -> None:
    with faults.collected():
        check_keys(cfg)
    if cfg.MODEL.META_ARCHITECTURE == "Distiller":
        with faults.collected():
            build_losses(cfg.MODEL.DISTILLER)
    with faults.collected():
        micro_batch(cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATE, "SOLVER")
    with faults.collected():
        _skip_unreadable(cfg)
        in_iterations(cfg)
    cfg.freeze()
    for detector in plugins.of_student(cfg):
        with faults.collected():
            detector.check(cfg)
    log_without_effect(cfg, cfg.MODEL.META_ARCHITECTURE == "Distiller")


def _skip_unreadable(cfg: CfgNode) -> None:
    if not cfg.DATASETS.SKIP_UNREADABLE:
        return
    with tempfile.TemporaryDirectory() as folder:
        for line in skip_unreadable([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST], folder):
            logger.warning(line)


def _names_teacher(args: argparse.Namespace) -> bool:
    """Whether the config or a KEY VALUE pair is about distillation; every yaml config has a default teacher."""
    if args.config_file.endswith(".py"):
        cfg = load_lazy_config(find_config(args.config_file), [])
        return "distiller" in cfg or lazy.is_distiller(cfg.model)
    model = read_config(find_config(args.config_file)).values.get("MODEL") or {}
    keys = pairs_of(args.opts)[::2]
    return "DISTILLER" in model or any(key.startswith("MODEL.DISTILLER.") for key in keys)
