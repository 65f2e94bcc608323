"""Pictures of what a loss looks at, for a few images of DATASETS.TEST: the work of ``distill-d2 visualize``."""

from __future__ import annotations

import argparse
import logging
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger

from ..checkpoint import SafeCheckpointer
from ..commands.arguments import chosen_device
from ..data import NamedReadErrors, build_mapper, check_datasets
from ..distiller import Distiller
from ..engine import load_config
from ..engine.output_dir import check_writable
from ..imports import import_modules
from ..losses import DISTILL_LOSS_REGISTRY
from ..losses.settings import keys_of
from . import Method, Picture, Row, load_methods
from .sheet import compose

logger = logging.getLogger("distill_d2.visualize")

# A loss is drawn independently of its schedule.
ALWAYS_ON = {"weight": 1.0, "start_iter": 0, "stop_iter": -1, "warmup_iters": 0}


def visualize(args: argparse.Namespace) -> list[str]:
    """Draw what the arguments of ``distill-d2 visualize`` say, and print the paths of the files.

    Returns:
        these paths.

    Raises:
        ImportError, KeyError, OSError, TypeError, ValueError: an argument, the config or a file is wrong.
    """
    setup_logger(name="distill_d2")
    job = prepare(args)
    return [draw_file(job, item, name, args.output) for name, item in job.items.items()]


@dataclass
class Job:
    """Everything that is drawn.

    Attributes:
        items: the dataset mapper's dicts, with ground truth, by the name of the picture.
        classes: names of the classes.
        detectors: lines of the header on teacher and student.
    """

    method: Method
    distiller: Distiller
    items: dict[str, dict[str, Any]]
    input_format: str
    classes: list[str]
    detectors: list[str]


def prepare(args: argparse.Namespace) -> Job:
    """Read and build everything.

    Raises:
        ImportError, KeyError, OSError, TypeError, ValueError: an argument, the config or a file is wrong.
    """
    methods = load_methods()
    if args.method not in methods:
        raise ValueError(f"--method {args.method}: expected one of {', '.join(sorted(methods))}")
    if args.images < 1:
        raise ValueError(f"--images {args.images}: expected at least 1")
    method = methods[args.method]
    import_modules(args.imports)
    cfg = read_config(args.config_file, args.opts, method)
    cfg.MODEL.DEVICE = chosen_device(args)
    check_writable(args.output, "--output")
    check_datasets(cfg, train=False)
    items = load_items(cfg, args.images)
    if not args.overwrite:
        check_new([picture_path(args.output, name, method) for name in items])
    distiller = build_distiller(cfg)
    random = not load_weights(distiller, method, cfg.MODEL.WEIGHTS)
    return Job(
        method=method,
        distiller=distiller,
        items=items,
        input_format=cfg.INPUT.FORMAT,
        classes=MetadataCatalog.get(cfg.DATASETS.TEST[0]).get("thing_classes", []),
        detectors=describe_detectors(cfg, args.config_file, random),
    )


def read_config(config_file: str, opts: list[str], method: Method) -> CfgNode:
    """The config of a Distiller with this one loss, of which nothing is to be trained."""
    if config_file.endswith(".py"):
        raise ValueError(f"--config-file {config_file}: a LazyConfig; only yaml configs can be drawn")
    cfg = load_config(config_file, opts)
    node = cfg.MODEL.DISTILLER
    if cfg.MODEL.META_ARCHITECTURE != "Distiller":
        node.STUDENT_META_ARCH = cfg.MODEL.META_ARCHITECTURE
        cfg.MODEL.META_ARCHITECTURE = "Distiller"
    node.TYPES = [method.loss]
    loss = DISTILL_LOSS_REGISTRY.get(method.loss)
    for name, value in ALWAYS_ON.items():
        if name in keys_of(loss.Settings):
            cfg.merge_from_list([loss.config_key(name), value])
    node.PRELOAD_FPN = node.PRELOAD_HEAD = False  # the student is what its checkpoint says
    node.PRETRAIN_TEACHER_ITERS = 0
    cfg.DATASETS.CHECK_IMAGES = 0
    cfg.VIS_PERIOD = 0
    return cfg


# Images.


def load_items(cfg: CfgNode, count: int) -> dict[str, dict[str, Any]]:
    """``count`` annotated images, spread evenly over DATASETS.TEST, by names that differ.

    Raises:
        ValueError: there are no annotations; an image, or its annotations, cannot be read.
    """
    names = list(cfg.DATASETS.TEST)
    records = [r for name in names for r in DatasetCatalog.get(name) if r.get("annotations")]
    if not records:
        raise ValueError(
            f"DATASETS.TEST {names}: no image has annotations; name a dataset with ground truth"
        )
    count = min(count, len(records))
    records = [records[index * len(records) // count] for index in range(count)]
    evaluation: Any = build_mapper(cfg, is_train=False)
    mapper = DatasetMapper(cfg, True, augmentations=evaluation.augmentations.augs, recompute_boxes=False)
    read = NamedReadErrors(mapper)
    return {name: read(record) for name, record in zip(file_stems(records), records)}


def file_stems(records: list[dict[str, Any]]) -> list[str]:
    """The names of the images' files; with a number where several are called the same."""
    stems, seen = [Path(record["file_name"]).stem for record in records], Counter[str]()
    for index, stem in enumerate(stems):
        seen[stem] += 1
        stems[index] = stem if seen[stem] == 1 else f"{stem}_{seen[stem]}"
    return stems


# Detectors.


def build_distiller(cfg: CfgNode) -> Distiller:
    """The Distiller in training mode, as losses need it, but for layers that would draw random numbers
    or take statistics of the one image (dropout, batch normalization)."""
    torch.manual_seed(max(cfg.SEED, 0))
    cfg = cfg.clone()
    cfg.DATASETS.TRAIN = ()  # no loss needs its statistics to be drawn
    distiller = build_model(cfg).train()
    distiller.losses.eval()
    for module in distiller.student.modules():
        if not any(True for _ in module.children()):
            module.eval()
    distiller.phases.supported_by_trainer = True  # phases of training do not matter here
    return distiller


def load_weights(distiller: Distiller, method: Method, path: str) -> bool:
    """Load a student's checkpoint, and the parameters of the method's loss.

    Returns:
        False: what is drawn depends on parameters, and they are random.

    Raises:
        OSError, ValueError: it cannot be read, does not fill the student, or does not fit the loss.
    """
    rest: dict[str, Any] = {}
    if path:
        rest = load_student(distiller, path)
    else:
        logger.warning("MODEL.WEIGHTS is empty: the student is drawn untrained")
    name, prefix = method.loss, f"{method.loss}."
    loss = distiller.losses[name]
    if not loss.state_dict() or not method.shows_parameters:
        return True
    entries = rest.get("distiller", {})
    state = {key[len(prefix) :]: v for key, v in entries.items() if key.startswith(prefix)}
    if state:
        load_loss(loss, state, f"{name} in MODEL.WEIGHTS '{path}'")
    elif distiller.preload_teacher:
        distiller.preload_student()
    else:
        logger.warning(
            f"{name} is drawn with RANDOM parameters: MODEL.WEIGHTS '{path}' holds none of it. Give a "
            "checkpoint of train_distill.py with this loss, there or in MODEL.DISTILLER.PRELOAD_TEACHER"
        )
        return False
    return True


def load_student(distiller: Distiller, path: str) -> dict[str, Any]:
    """Load the student's weights; returns the checkpoint's other entries."""
    checkpointer = SafeCheckpointer(distiller.student)
    rest = checkpointer.load(path)
    keys = checkpointer.incompatible
    missing = keys.missing_keys + [name for name, _, _ in keys.incorrect_shapes]
    if missing:
        raise ValueError(
            f"MODEL.WEIGHTS '{path}' is not a checkpoint of this student: {len(missing)} of its tensors "
            f"are missing or of another shape: {sorted(set(missing))[:5]}. Give a checkpoint of its "
            "training, or '' for an untrained student"
        )
    return rest


def load_loss(loss: torch.nn.Module, state: dict[str, torch.Tensor], source: str) -> None:
    try:
        loss.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{source} has other settings than the config: {error}. Use those of the run that wrote it"
        ) from error
    logger.info(f"Loaded {len(state)} tensors of {source}")


def describe_detectors(cfg: CfgNode, config_file: str, random_loss: bool) -> list[str]:
    node = cfg.MODEL.DISTILLER
    teacher = node.TEACHER_WEIGHTS or "the weights of its config"
    student = _short(cfg.MODEL.WEIGHTS) or "untrained"
    note = "; the loss's parameters are RANDOM" if random_loss else ""
    return [
        f"teacher: {Path(node.MODEL_DISTILLER_CONFIG).name}, {_short(teacher)}",
        f"student: {Path(config_file).name}, {student}{note}",
    ]


def _short(path: str) -> str:
    return os.sep.join(path.split(os.sep)[-2:])


# Pictures.


def picture_path(folder: str, name: str, method: Method) -> str:
    return os.path.join(folder, f"{name}_{method.name}.png")


def check_new(paths: list[str]) -> None:
    """Raises FileExistsError if one exists."""
    old = [path for path in paths if os.path.exists(path)]
    if old:
        raise FileExistsError(
            f"{len(old)} of {len(paths)} pictures exist, the first is '{old[0]}'; give --overwrite to replace "
            "them, or another --output"
        )


def draw_file(job: Job, item: dict[str, Any], name: str, folder: str) -> str:
    """Draw one image; the path of the file."""
    header = [f"{Path(item['file_name']).name}: {job.method.loss}", *job.detectors]
    path = picture_path(folder, name, job.method)
    compose(draw(job, item), header).savefig(path)
    print(path)
    return path


@torch.no_grad()
def draw(job: Job, item: dict[str, Any]) -> list[Row]:
    """The rows of one image, drawn in the moment in which the loss is given both views."""
    loss, picture, rows = job.distiller.losses[job.method.loss], picture_of(job, item), []
    hook = loss.register_forward_pre_hook(
        lambda _, seen: rows.extend(job.method.draw(loss, *seen, picture))
    )
    try:
        # As in the last iteration of a training: ICD's temperature changes in its course.
        with EventStorage(job.distiller.max_iter):
            job.distiller([item])
    finally:
        hook.remove()
    return rows


def picture_of(job: Job, item: dict[str, Any]) -> Picture:
    pixels = item["image"].permute(1, 2, 0).cpu().numpy()
    pixels = pixels[..., ::-1] if job.input_format == "BGR" else pixels
    return Picture(np.ascontiguousarray(pixels), item["instances"], job.classes)
