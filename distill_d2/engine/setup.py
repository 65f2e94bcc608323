"""From command-line arguments to a complete, checked config."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.utils import comm

from .. import model_zoo
from ..commands.arguments import check_config_arguments
from ..config import student_config
from ..data import check_datasets, raised, skip_unreadable
from ..evaluation import try_evaluator
from ..imports import check_note, imported, write_note
from ..losses import build_losses
from ..losses.base import keys_without_effect
from ..plugins import ground_truth, of_student
from ..random_state import random_state, set_random_state
from ..teacher import teacher_weights
from .best import check_metric
from .config_loading import load_config, output_dir
from .config_writing import check_is_no_student_config, write_configs
from .epochs import in_iterations
from .key_rules import check_keys, check_student_name
from .output_dir import claim, kept
from .run_log import start_log
from .run_summary import log_environment
from .settings import RunSettings, micro_batch
from .trackers import check_trackers
from .trainer import DistillTrainer

logger = logging.getLogger(__name__)


def setup(args: Any, distill: bool, trainer: type[DistillTrainer] = DistillTrainer) -> CfgNode:
    """Load, complete and check the config; start logging to OUTPUT_DIR. Call it in every process.

    Args:
        args: of ``argument_parser``.
        distill: wrap the config's model in the Distiller; False (or --eval-only): the student alone.
        trainer: its ``build_evaluator`` is tried on the test datasets.

    Raises:
        FileNotFoundError, OSError, ValueError, KeyError: see ``load_config``.
    """
    cfg = read_run_config(args, distill)
    distill = distill and not args.eval_only
    check_keys(cfg, train=not args.eval_only)
    if cfg.MODEL.META_ARCHITECTURE == "Distiller":
        build_losses(cfg.MODEL.DISTILLER)  # raises for wrong settings of losses
    if not args.eval_only:
        micro_batch(cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATE, "SOLVER")
    claim(cfg.OUTPUT_DIR, "OUTPUT_DIR", args, lambda: weights_read(cfg, distill))
    skipped = []
    if cfg.DATASETS.SKIP_UNREADABLE:
        names = [*(() if args.eval_only else cfg.DATASETS.TRAIN), *cfg.DATASETS.TEST]
        skipped = skip_unreadable(names, cfg.OUTPUT_DIR)
    schedule = "" if args.eval_only else in_iterations(cfg)  # of the images that are left
    cfg.freeze()
    with kept(os.path.join(cfg.OUTPUT_DIR, "config.yaml"), args.eval_only):
        start_log(cfg.OUTPUT_DIR)
        log_environment(args.config_file, cfg.OUTPUT_DIR)
        default_setup(cfg, args)
        if comm.is_main_process():
            write_configs(cfg, train=not args.eval_only)
    note_imports(cfg.OUTPUT_DIR, args.imports, write=not args.eval_only)
    for line in skipped:
        logger.warning(line)
    if schedule:
        logger.info(schedule)
    log_without_effect(cfg, distill)
    for detector in of_student(cfg):
        detector.check(cfg)
    if comm.is_main_process():
        check_data(cfg, trainer, train=not args.eval_only)
    comm.synchronize()
    return cfg


def read_run_config(args: Any, distill: bool) -> CfgNode:
    """The config of the arguments, with or without the Distiller, on a device that is there; its values are not
    checked. Arguments and errors: see ``setup``."""
    check_config_arguments(args)
    args.config_file = model_zoo.find_config(args.config_file) if args.config_file else ""
    distill = distill and not args.eval_only
    if distill:
        check_is_no_student_config(args.config_file)
    try:
        cfg = load_config(args.config_file, args.opts, train=not args.eval_only, need_teacher=distill)
    except KeyError:
        # A module that --import does not name may bring the key.
        check_note(output_dir(args.config_file, args.opts or []))
        raise
    if args.resume or args.eval_only:
        check_note(cfg.OUTPUT_DIR)
    cfg.MODEL.DEVICE = choose_device(cfg.MODEL.DEVICE, args.num_gpus)
    cfg.WANDB.ENABLED = cfg.WANDB.ENABLED or args.wandb
    if not args.eval_only:
        check_trackers(cfg)
    check_student_name(cfg)
    return _with_distiller(cfg) if distill else student_config(cfg)


def log_without_effect(cfg: CfgNode, distill: bool) -> None:
    """Log the keys that this student, or its losses, do not read although they are set."""
    unused = keys_without_effect(cfg.MODEL.DISTILLER) if distill else []
    if unused:
        logger.warning(f"Without effect, since MODEL.DISTILLER.TYPES does not name their loss: {unused}")
    for key, kind in (("MASK_ON", "masks"), ("KEYPOINT_ON", "keypoints")):
        students = [detector.name for detector in of_student(cfg) if cfg.MODEL[key]]
        if students and kind not in ground_truth(cfg):
            logger.warning(
                f"MODEL.{key} is True: without effect, since {students[0]} predicts no {kind}"
            )


def check_data(
    cfg: CfgNode,
    trainer: type[DistillTrainer],
    train: bool = True,
    told: Callable[[Exception], None] = raised,
) -> None:
    """Check the datasets, the mapper and the evaluators; what is random afterwards does not change. Arguments and
    errors: see ``setup`` and ``check_plan``."""
    metrics: dict[str, set[str]] = {}

    def try_evaluation(name: str, records: list[dict[str, Any]]) -> None:
        truth = ground_truth(cfg)
        metrics[name] = try_evaluator(
            name,
            records,
            lambda folder: trainer.build_evaluator(_with_output(cfg, folder), name),
            masks="masks" in truth,
            keypoints="keypoints" in truth,
        )

    state = random_state()
    check_datasets(cfg, train, try_evaluation, told)
    set_random_state(state)
    if train:
        check_metric(cfg.TEST.KEEP_BEST, {name: metrics.get(name, set()) for name in cfg.DATASETS.TEST})


def _with_output(cfg: CfgNode, folder: str) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = folder
    return cfg


def _with_distiller(cfg: CfgNode) -> CfgNode:
    if cfg.MODEL.META_ARCHITECTURE != "Distiller":
        cfg.MODEL.DISTILLER.STUDENT_META_ARCH = cfg.MODEL.META_ARCHITECTURE
        cfg.MODEL.META_ARCHITECTURE = "Distiller"
    return cfg


def weights_read(cfg: Any, distill: bool) -> list[str]:
    """Paths and addresses of the weights that a run reads."""
    settings = RunSettings.from_config(cfg)
    node = settings.distiller
    teacher = [teacher_weights(node)] if distill and node.MODEL_DISTILLER_CONFIG else []
    return [settings.weights, node.PRELOAD_TEACHER, *teacher]


def choose_device(device: str, num_gpus: int) -> str:
    """The device to train on: a config's "cuda" means the CPU with --num-gpus 0.

    Raises:
        ValueError: torch knows no such device, cannot use it, or no GPU is available.
    """
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"MODEL.DEVICE is {device!r}; expected 'cuda', 'cpu' or another of torch"
        ) from error
    if kind == "cuda" and not torch.cuda.is_available():
        if num_gpus == 0:
            return "cpu"
        raise ValueError(
            f"--num-gpus {num_gpus} and device '{device}', but torch sees no GPU; for the CPU use "
            "--num-gpus 0"
        )
    try:
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"MODEL.DEVICE is '{device}', which torch cannot use here: {reason}") from error
    return device


def note_imports(folder: str, names: Sequence[str], write: bool) -> None:
    """Log what users' modules were imported, and note those of --import beside the run's config."""
    for line in imported():
        logger.info(f"Imported {line}")
    if write and comm.is_main_process():
        write_note(folder, names)
