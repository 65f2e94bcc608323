"""Whole trainings of tiny detectors on a tiny dataset."""

from __future__ import annotations

import json
import math
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

from distill_d2.engine import DistillTrainer, argument_parser, main, setup
from distill_d2.testing import (
    Cell,
    distiller_config,
    families,
    recipes,
    save_teacher,
    tiny_config,
    use_dataset,
    write_dataset,
)

from .report import Report

STEPS = 6
LOSSES = ["PKD", "GID", "InstanceConditionalDistillation"]


def check_runs(report: Report, device: str) -> None:
    checks = {
        "mixed precision, loaders with workers": trains_in_mixed_precision,
        "a resumed run": resumes,
        "one process of a group, DDP": trains_in_a_process_group,
    }
    if device != "cpu":
        checks["images are in pinned memory"] = loads_into_pinned_memory
    for name, check in checks.items():
        with tempfile.TemporaryDirectory() as folder:
            report.run("runs", name, partial(check, Path(folder), device))


def trains_in_mixed_precision(folder: Path, device: str) -> str:
    """Its losses are finite, and it leaves a checkpoint."""
    cfg = config_of(folder, LOSSES)
    cfg.SOLVER.AMP.ENABLED = True
    cfg.DATALOADER.NUM_WORKERS = 2
    run(cfg, folder, device)
    losses = last_losses(folder)
    missing = [name for name in ("pkd", "gid", "icd") if not any(name in loss for loss in losses)]
    broken = {name: value for name, value in losses.items() if not math.isfinite(value)}
    if missing or broken:
        raise AssertionError(f"no losses of {missing}; not finite: {broken}")
    return f"total loss {losses['total_loss']:.3f} after {STEPS} steps"


def resumes(folder: Path, device: str) -> str:
    """A run that is resumed half way ends as the uninterrupted one, up to the order of sums."""
    cfg = config_of(folder, LOSSES)
    cfg.SOLVER.CHECKPOINT_PERIOD = STEPS // 2
    run(cfg, folder, device)
    whole = weights_of(folder)
    (folder / "output" / "last_checkpoint").write_text(f"model_{STEPS // 2 - 1:07d}.pth")
    run(cfg, folder, device, "--resume")
    resumed = weights_of(folder)
    errors = [float((whole[name] - resumed[name]).abs().max()) for name in whole]
    if not max(errors) <= (1e-3 if device != "cpu" else 0.0):
        raise AssertionError(f"weights of the resumed run differ by {max(errors):g}")
    return f"weights differ by at most {max(errors):.1e}"


def trains_in_a_process_group(folder: Path, device: str) -> str:
    """Over NCCL, or gloo on a CPU; DDP would fail at parameters without a gradient."""
    backend = "gloo" if device == "cpu" else "nccl"
    store = f"file://{folder}/store"
    torch.distributed.init_process_group(backend, init_method=store, rank=0, world_size=1)
    try:
        for name in LOSSES:
            cell = Cell.of_recipe(recipes()[name], families()["RetinaNet"], device)
            devices = None if device == "cpu" else [torch.cuda.current_device()]
            model = DistributedDataParallel(cell.distiller(), device_ids=devices)
            with EventStorage(0):
                for _ in range(2):
                    sum(model(cell.family.batch()).values()).backward()
    finally:
        torch.distributed.destroy_process_group()
    return backend


def loads_into_pinned_memory(folder: Path, device: str) -> None:
    for workers in (0, 2):
        cfg = config_of(folder, ["PKD"])
        cfg.DATALOADER.NUM_WORKERS = workers
        trainer = DistillTrainer(setup(arguments_of(cfg, folder, device), distill=True))
        batch = next(iter(trainer.data_loader))
        if not all(item["image"].is_pinned() for item in batch):
            raise AssertionError(f"not with DATALOADER.NUM_WORKERS {workers}")


def config_of(folder: Path, losses: list[str]) -> CfgNode:
    """A RetinaNet that learns from a wider one."""
    student = tiny_config()
    student.VERSION = 2
    use_dataset(student, write_dataset(folder / "data"))
    student.DATASETS.TEST = ()
    teacher = save_teacher(tiny_config(width=16), folder / "teacher")
    cfg = distiller_config(student, teacher, losses)
    node = cfg.MODEL.DISTILLER
    for loss in losses:
        recipes()[loss].set_keys(node, families()["RetinaNet"])
    cfg.SOLVER.MAX_ITER = STEPS
    cfg.OUTPUT_DIR = str(folder / "output")
    return cfg


def arguments_of(cfg: CfgNode, folder: Path, device: str, *more: str) -> Any:
    cfg.MODEL.DEVICE = device
    path = folder / "config.yaml"
    path.write_text(cfg.dump())
    gpus = "0" if device == "cpu" else "1"
    return argument_parser().parse_args(["--num-gpus", gpus, "--config-file", str(path), *more])


def run(cfg: CfgNode, folder: Path, device: str, *more: str) -> None:
    """train_distill.py in this process."""
    main(arguments_of(cfg, folder, device, *more), distill=True)


def last_losses(folder: Path) -> dict[str, float]:
    """The losses that were logged last."""
    lines = (folder / "output" / "metrics.json").read_text().splitlines()
    last = [json.loads(line) for line in lines if "total_loss" in line][-1]
    return {name: value for name, value in last.items() if "loss" in name}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "output" / "model_final.pth"
    state = torch.load(path, weights_only=True, map_location="cpu")["model"]
    return {name: torch.as_tensor(value).double() for name, value in state.items()}
