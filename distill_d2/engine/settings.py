"""What the trainer reads of a config, in one form for yaml (yacs) and LazyConfig (.py) files."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..config import add_distill_config
from ..precision import native_bfloat16

# Iterations between two lines in the log; a yaml config has no key for it.
LOG_PERIOD = 20
# Where a LazyConfig keeps its ``distiller`` when only the student is built.
UNUSED_DISTILLER = "distiller_not_used"


@dataclass(frozen=True)
class RunSettings:
    """The settings of one training or evaluation. Names of keys: those of yaml, then of LazyConfig."""

    # Folder of checkpoints, metrics, log and results: OUTPUT_DIR, train.output_dir.
    output_dir: str
    # Path or URL of the weights to start from, "" for a new model: MODEL.WEIGHTS, train.init_checkpoint.
    weights: str
    # Device of the model: MODEL.DEVICE, train.device.
    device: str
    # Iterations of the student, without those of pretraining: SOLVER.MAX_ITER, train.max_iter.
    max_iter: int
    # Iterations at which the student's learning rate drops, which solvers of losses follow: SOLVER.STEPS.
    # None: not known, as in a LazyConfig; then each solver has STEPS of its own.
    steps: tuple[int, ...] | None
    # Iterations between checkpoints, 0 for the last alone: SOLVER.CHECKPOINT_PERIOD,
    # train.checkpointer.period.
    checkpoint_period: int
    # Iterations between evaluations, 0 for one at the end: TEST.EVAL_PERIOD, train.eval_period.
    eval_period: int
    # Micro-batches of a step, whose gradients are averaged: SOLVER.ACCUMULATE, train.accumulate.
    accumulate: int
    # The decay of the moving average of the student's weights, 0 for none: SOLVER.EMA, train.ema.
    ema: float
    # Whether the student's convolutions use the faster layout and kernels: MODEL.FAST_KERNELS,
    # train.fast_kernels.
    fast_kernels: bool
    # The metric of model_best.pth, "" for none: TEST.KEEP_BEST, train.keep_best.
    keep_best: str
    # Evaluations without a better one after which the run ends, 0 for never: TEST.PATIENCE, train.patience.
    patience: int
    # Iterations between lines in the log and in metrics.json: LOG_PERIOD, train.log_period.
    log_period: int
    # The key that turns on mixed precision, "" for float32: SOLVER.AMP.ENABLED, train.amp.enabled.
    amp_key: str
    # Further arguments of detectron2's create_ddp_model, such as fp16_compression: none, train.ddp.
    ddp: Mapping[str, Any]
    # Channel order of the images in a batch: INPUT.FORMAT, dataloader.train.mapper.image_format.
    # None: not known; then that of the student, see ``channel_order``.
    input_format: str | None
    # Iterations that measure batch norm statistics before an evaluation, 0 for none: TEST.PRECISE_BN.
    precise_bn_iters: int
    # Whether the last results are compared with TEST.EXPECTED_RESULTS; a LazyConfig has none.
    verify_results: bool
    # Whether datasets are checked before the run: DATASETS.CHECK, dataloader.check, "all" or "none".
    check_data: bool
    # Names of the datasets, () if they are not known: DATASETS.TRAIN and TEST,
    # dataloader.train.dataset.names and dataloader.evaluator.dataset_name.
    train_datasets: tuple[str, ...]
    test_datasets: tuple[str, ...]
    # MODEL.DISTILLER; of a LazyConfig its dict ``distiller``, completed by the defaults.
    distiller: CfgNode

    @classmethod
    def from_config(cls, cfg: CfgNode | DictConfig) -> RunSettings:
        return cls.from_yacs(cfg) if isinstance(cfg, CfgNode) else cls.from_lazy(cfg)

    @classmethod
    def from_yacs(cls, cfg: CfgNode) -> RunSettings:
        return cls(
            output_dir=cfg.OUTPUT_DIR,
            weights=cfg.MODEL.WEIGHTS,
            device=cfg.MODEL.DEVICE,
            max_iter=cfg.SOLVER.MAX_ITER,
            steps=tuple(cfg.SOLVER.STEPS),
            checkpoint_period=cfg.SOLVER.CHECKPOINT_PERIOD,
            eval_period=cfg.TEST.EVAL_PERIOD,
            accumulate=cfg.SOLVER.ACCUMULATE,
            ema=cfg.SOLVER.EMA,
            fast_kernels=cfg.MODEL.FAST_KERNELS,
            keep_best=cfg.TEST.KEEP_BEST,
            patience=cfg.TEST.PATIENCE,
            log_period=LOG_PERIOD,
            amp_key="SOLVER.AMP.ENABLED" if cfg.SOLVER.AMP.ENABLED else "",
            ddp={},
            input_format=cfg.INPUT.FORMAT,
            precise_bn_iters=cfg.TEST.PRECISE_BN.NUM_ITER if cfg.TEST.PRECISE_BN.ENABLED else 0,
            verify_results=len(cfg.TEST.EXPECTED_RESULTS) > 0,
            check_data=cfg.DATASETS.CHECK == "all",
            train_datasets=tuple(cfg.DATASETS.TRAIN),
            test_datasets=tuple(cfg.DATASETS.TEST),
            distiller=cfg.MODEL.DISTILLER,
        )

    @classmethod
    def from_lazy(cls, cfg: DictConfig) -> RunSettings:
        """
        Raises:
            KeyError, ValueError: ``distiller`` has a key that MODEL.DISTILLER lacks, or a value of
                another type.
        """
        train = cfg.train
        return cls(
            output_dir=train.output_dir,
            weights=train.init_checkpoint,
            device=train.device,
            max_iter=train.max_iter,
            steps=None,
            checkpoint_period=train.checkpointer.period,
            eval_period=train.eval_period,
            accumulate=train.get("accumulate", 1),
            ema=train.get("ema", 0.0),
            fast_kernels=train.get("fast_kernels", False),
            keep_best=train.get("keep_best", ""),
            patience=train.get("patience", 0),
            log_period=train.log_period,
            amp_key="train.amp.enabled" if train.amp.enabled else "",
            ddp=dict(train.get("ddp", {})),
            input_format=OmegaConf.select(cfg, "dataloader.train.mapper.image_format"),
            precise_bn_iters=0,
            verify_results=False,
            check_data=OmegaConf.select(cfg, "dataloader.check", default="all") == "all",
            train_datasets=_names(cfg, "dataloader.train.dataset.names"),
            test_datasets=_names(cfg, "dataloader.evaluator.dataset_name"),
            distiller=distiller_node(cfg.get("distiller") or cfg.get(UNUSED_DISTILLER) or {}),
        )

    def channel_order(self, student: nn.Module) -> str:
        """Channel order of the images in a batch, "BGR" or "RGB"."""
        return self.input_format or getattr(student, "input_format", None) or "BGR"

    def autocast_dtype(self) -> torch.dtype | None:
        """The type of mixed precision; None for float32.

        Raises:
            ValueError: see the function ``autocast_dtype``.
        """
        return autocast_dtype(self.device, self.amp_key) if self.amp_key else None


def micro_batch(images: int, parts: int, node: str) -> int:
    """The images that a process gives to the model at a time.

    Args:
        images: of a step, of all processes: IMS_PER_BATCH, dataloader.train.total_batch_size.
        parts: of a step: ACCUMULATE.
        node: of these keys, "SOLVER", or "train" for a LazyConfig.

    Raises:
        ValueError: they cannot be shared equally.
    """
    processes = comm.get_world_size()
    if images >= processes * parts and images % (processes * parts) == 0:
        return images // processes // parts
    yaml = node == "SOLVER"
    key = "SOLVER.IMS_PER_BATCH" if yaml else "dataloader.train.total_batch_size"
    times = f" times {node}.{'ACCUMULATE' if yaml else 'accumulate'}, {parts}" if parts > 1 else ""
    raise ValueError(f"{key} is {images}; expected a multiple of the {processes} processes{times}")


def autocast_dtype(device: str, key: str = "SOLVER.AMP.ENABLED") -> torch.dtype:
    """The type of mixed precision: float16 on a GPU, as in detectron2; bfloat16 on a CPU.

    Args:
        key: the config key that turns it on, for the message.

    Raises:
        ValueError: the device is a CPU that only emulates bfloat16.
    """
    if torch.device(device).type != "cpu":
        return torch.float16
    if not native_bfloat16(torch.device("cpu")):
        raise ValueError(
            f"{key} is True, but this processor only emulates bfloat16, slower than float32; set it "
            "to False"
        )
    return torch.bfloat16


def _names(cfg: DictConfig, key: str) -> tuple[str, ...]:
    """The registered datasets that a LazyConfig names at this place."""
    names = OmegaConf.select(cfg, key) or ()
    listed = [names] if isinstance(names, str) else list(names)
    return tuple(name for name in listed if name in DatasetCatalog.list())


def distiller_node(values: Mapping[str, Any]) -> CfgNode:
    """MODEL.DISTILLER with its defaults, and these values of a LazyConfig.

    Raises:
        KeyError, ValueError: an unknown key; a value of another type.
    """
    cfg = get_cfg()
    add_distill_config(cfg)
    plain = OmegaConf.to_container(values, resolve=True) if isinstance(values, DictConfig) else values
    cfg.MODEL.DISTILLER.merge_from_other_cfg(CfgNode(plain))
    return cfg.MODEL.DISTILLER


def in_subfolder(cfg: CfgNode | DictConfig, name: str) -> CfgNode | DictConfig:
    """A copy of the config whose output goes to the folder ``name`` inside its own."""
    folder = os.path.join(RunSettings.from_config(cfg).output_dir, name)
    cfg = copy.deepcopy(cfg)
    if isinstance(cfg, CfgNode):
        cfg.defrost()
        cfg.OUTPUT_DIR = folder
    else:
        cfg.train.output_dir = folder
    return cfg
