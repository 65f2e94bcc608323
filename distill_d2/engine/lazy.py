"""The same training for LazyConfig (.py) students.

Such a config has detectron2's usual parts, model, optimizer, lr_multiplier, dataloader, train. For
train_distill.py it also has ``distiller``, a dict of the keys of MODEL.DISTILLER, for example

    distiller = dict(TYPES=["PKD"], MODEL_DISTILLER_CONFIG="COCO-Detection/retinanet_R_101_FPN_3x.yaml")

or its ``model`` is a complete ``L(Distiller)(student=..., teacher=L(load_teacher)(...), losses=[...])``.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections import OrderedDict
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import default_setup
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from torch import nn

from .. import model_zoo
from ..config_values import config_keys
from ..data import (
    ResumableTrainingSampler,
    ShieldedLoader,
    batched_test_loader,
    build_train_loader,
    register_builtin_voc,
    register_shapes,
    seeded,
)
from ..distiller import Distiller, node_arguments, use_statistics
from ..evaluation import with_model_evaluators
from ..imports import check_note
from ..lazy_config import apply_overrides, load_lazy_config
from .config_loading import is_official, locate_teacher
from .epochs import LAZY_IN_EPOCHS, lazy_in_iterations, lazy_options_decide
from .key_rules import check_lazy_keys
from .lazy_data import check_lazy_data
from .optimizer import trained_with_student
from .output_dir import claim, kept
from .run_log import start_log
from .run_summary import log_environment
from .settings import UNUSED_DISTILLER, RunSettings, distiller_node, micro_batch
from .setup import choose_device, note_imports, weights_read
from .trainer import DistillTrainer

logger = logging.getLogger(__name__)

# What every run reads of detectron2's usual parts ...
_REQUIRED = (
    "model",
    "dataloader",
    "train.output_dir",
    "train.init_checkpoint",
    "train.device",
    "train.max_iter",
    "train.checkpointer.period",
    "train.eval_period",
    "train.log_period",
    "train.amp.enabled",
)
# ... what it reads where it is there ...
_OPTIONAL = (
    "train.accumulate",
    "train.ema",
    "train.fast_kernels",
    "train.keep_best",
    "train.patience",
)
# ... and what a training reads, too.
_REQUIRED_TO_TRAIN = ("optimizer", "lr_multiplier", "dataloader.train")


def setup(args: argparse.Namespace, distill: bool) -> DictConfig:
    """Load the config, apply path.key=value pairs, check it, start logging.

    Raises:
        FileNotFoundError, ValueError, OSError: the message names the key or file.
    """
    cfg = read_run_config(args, distill)
    check_lazy_keys(cfg)
    claim(cfg.train.output_dir, "train.output_dir", args, lambda: weights_read(cfg, distill))
    schedule = "" if args.eval_only else lazy_in_iterations(cfg)
    with kept(os.path.join(cfg.train.output_dir, "config.yaml"), args.eval_only):
        start_log(cfg.train.output_dir)
        log_environment(args.config_file, cfg.train.output_dir)
        default_setup(cfg, args)
    logger.info(f"Ran the code of {args.config_file}, a LazyConfig")
    if schedule:
        logger.info(schedule)
    note_imports(cfg.train.output_dir, args.imports, write=not args.eval_only)
    if comm.is_main_process():
        check_lazy_data(cfg, student_of(cfg), train=not args.eval_only)
    comm.synchronize()
    return cfg


def read_run_config(args: argparse.Namespace, distill: bool) -> DictConfig:
    """The config of the arguments, with or without ``distiller``, on a device that is there; its values are not
    checked. Errors: see ``setup``."""
    if args.wandb:
        raise ValueError("--wandb works with yaml configs only; leave it out")
    args.config_file = model_zoo.find_config(args.config_file)
    check_note(os.path.dirname(args.config_file))
    cfg = load_lazy_config(
        args.config_file, _REQUIRED if args.eval_only else _REQUIRED + _REQUIRED_TO_TRAIN
    )
    _check_overrides(cfg, args.opts or [])
    cfg = apply_overrides(cfg, args.opts or [])
    lazy_options_decide(cfg, [word.partition("=")[0].lstrip("+") for word in args.opts or []])
    _locate_teacher(cfg, os.path.dirname(args.config_file), needed=distill and not args.eval_only)
    if args.resume or args.eval_only:
        check_note(cfg.train.output_dir)
    cfg.train.device = choose_device(cfg.train.device, args.num_gpus)
    if not distill or args.eval_only:
        cfg.model = student_of(cfg)
        distiller = cfg.pop("distiller", {})
        if distill:
            cfg[UNUSED_DISTILLER] = distiller
    elif "distiller" not in cfg and not is_distiller(cfg.model):
        raise ValueError(
            f"{args.config_file} has neither 'distiller' (a dict of MODEL.DISTILLER's keys) nor a "
            "model L(Distiller)(...), so there is nothing to distill"
        )
    register_shapes()
    register_builtin_voc()
    return cfg


_MISSING = object()
_DETECTRON2_TEST_LOADER = [
    build_detection_test_loader,
    "detectron2.data.build_detection_test_loader",
    "detectron2.data.build.build_detection_test_loader",
]
_DETECTRON2_LOADER = [
    build_detection_train_loader,
    "detectron2.data.build_detection_train_loader",
    "detectron2.data.build.build_detection_train_loader",
]


class LazyDistillTrainer(DistillTrainer):
    """DistillTrainer whose parts are instantiated from a LazyConfig.

    Of detectron2's data loader, L(build_detection_train_loader)(...), a resumed run continues the order of images;
    another one starts again.
    """

    @classmethod
    def build_model(cls, cfg: DictConfig) -> nn.Module:
        model = instantiate(cfg.model).to(cfg.train.device)
        settings = RunSettings.from_lazy(cfg)
        datasets = settings.train_datasets
        if isinstance(model, Distiller):
            use_statistics(model.losses.values(), datasets)
        if "distiller" not in cfg:
            return model
        return Distiller(
            student=model,
            **node_arguments(settings.distiller, settings.device, datasets),
            input_format=settings.channel_order(model),
            max_iter=settings.max_iter,
        ).to(settings.device)

    @classmethod
    def build_optimizer(cls, cfg: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
        cfg.optimizer.params.model = trained_with_student(model)
        optimizer = _instantiated(cfg, "optimizer")
        cfg.optimizer.params.model = None
        return optimizer

    @classmethod
    def build_lr_scheduler(cls, cfg: DictConfig, optimizer: torch.optim.Optimizer) -> LRMultiplier:
        return LRMultiplier(optimizer, _instantiated(cfg, "lr_multiplier"), cfg.train.max_iter)

    @classmethod
    def build_train_loader(cls, cfg: DictConfig):
        accumulate = RunSettings.from_lazy(cfg).accumulate
        loader = _resumable_loader(cfg.dataloader.train, accumulate)
        if loader is None and accumulate > 1:
            raise ValueError(
                f"train.accumulate is {accumulate}; expected 1 where dataloader.train is not "
                "L(build_detection_train_loader)(...) of detectron2 with a list of images"
            )
        return instantiate(cfg.dataloader.train) if loader is None else loader

    @classmethod
    def test(cls, cfg: DictConfig, model: nn.Module, evaluators=None) -> dict[str, Any]:
        if "evaluator" not in cfg.dataloader:
            return OrderedDict()
        loader = _test_loader(cfg.dataloader.test, model)
        evaluator = with_model_evaluators(instantiate(cfg.dataloader.evaluator), model)
        results = inference_on_dataset(model, loader, evaluator)
        if comm.is_main_process():
            print_csv_format(results)
        return results

    @staticmethod
    def auto_scale_workers(cfg: DictConfig, num_workers: int) -> DictConfig:
        return cfg


def _test_loader(node: DictConfig, model: nn.Module) -> Any:
    """detectron2's ``build_detection_test_loader`` with a batch_size has batches of one padded size; other loaders
    are as they are."""
    arguments = {str(key): value for key, value in node.items() if key != "_target_"}
    known = {"dataset", "mapper", "num_workers", "batch_size"}
    detectron2s = node.get("_target_") in _DETECTRON2_TEST_LOADER and set(arguments) <= known
    if not detectron2s or arguments.get("batch_size", 1) == 1:
        return instantiate(node)
    parts = {key: instantiate(value) for key, value in arguments.items()}
    if not isinstance(parts["dataset"], list):
        return instantiate(node)
    return batched_test_loader(parts.pop("dataset"), parts.pop("mapper"), model, **parts)


def _resumable_loader(node: DictConfig, accumulate: int) -> ShieldedLoader | None:
    """Our loader in place of detectron2's ``build_detection_train_loader``; None if the node is another one.

    Args:
        accumulate: the loader's batches in a step.

    Raises:
        ValueError: the processes cannot share the batch equally.
    """
    keys = {"dataset", "mapper", "sampler", "total_batch_size", "aspect_ratio_grouping", "num_workers"}
    if node.get("_target_") not in _DETECTRON2_LOADER or not set(node) <= keys | {"_target_"}:
        return None
    parts = {key: instantiate(node[key]) for key in node if key not in ("_target_", "sampler")}
    dataset = parts["dataset"]
    if not isinstance(dataset, list):
        return None
    given = node.get("sampler")
    sampler = ResumableTrainingSampler(
        seeded(lambda: TrainingSampler(len(dataset)) if given is None else instantiate(given)),
        batch_size=micro_batch(parts["total_batch_size"], accumulate, "train"),
        wide=[image["width"] > image["height"] for image in dataset]
        if parts.get("aspect_ratio_grouping", True)
        else None,
    )
    return build_train_loader(dataset, parts["mapper"], sampler, parts.get("num_workers", 0))


def _check_overrides(cfg: DictConfig, overrides: list[str]) -> None:
    # A key of MODEL.DISTILLER that the file leaves at its default is known, too.
    known = config_keys(distiller_node({}), "distiller.") if "distiller" in cfg else []
    known += [*LAZY_IN_EPOCHS.values(), *_OPTIONAL]
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals:
            raise ValueError(f"'{override}': a .py config is changed by path.key=value")
        if key in known:
            continue
        if key[:1] not in ("+", "~") and OmegaConf.select(cfg, key, default=_MISSING) is _MISSING:
            raise KeyError(f"unknown config key '{key}'; +{key}=... adds a new one")


def _locate_teacher(cfg: DictConfig, folder: str, needed: bool) -> None:
    """Make the teacher's file absolute: later code does not know where the config is."""
    node = cfg.get("distiller")
    if not node or not isinstance(node.get("MODEL_DISTILLER_CONFIG"), str):
        return
    official = node.get("MODEL_LOAD_OFFICIAL", True)
    node.MODEL_LOAD_OFFICIAL = is_official(node.MODEL_DISTILLER_CONFIG, official, [folder])
    if not node.MODEL_LOAD_OFFICIAL:
        node.MODEL_DISTILLER_CONFIG = locate_teacher(node.MODEL_DISTILLER_CONFIG, [folder], needed)


def _instantiated(cfg: DictConfig, key: str) -> Any:
    """Raises ValueError, naming the key, if the class does not take the values of ``cfg[key]``."""
    try:
        return instantiate(cfg[key])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"'{key}' of the LazyConfig cannot be built from its values: {error}"
        ) from error


def is_distiller(model: DictConfig) -> bool:
    """Whether a model of a LazyConfig is a Distiller."""
    target = model.get("_target_", "")
    return target is Distiller or str(target).endswith(".Distiller")


def student_of(cfg: DictConfig) -> DictConfig:
    """The student's part of a LazyConfig."""
    return cfg.model.student if is_distiller(cfg.model) else cfg.model
