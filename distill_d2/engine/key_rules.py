"""The table of a run's keys: what SOLVER, INPUT, DATASETS, DATALOADER, TEST and MODEL.DISTILLER may hold."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import GeneralizedRCNN
from omegaconf import DictConfig

from ..config import add_distill_config, student_config
from ..data.augmentation import AUGMENTATION_REGISTRY, DATASET_MAPPER_REGISTRY
from ..epochs import IN_EPOCHS
from ..losses import DISTILL_LOSS_REGISTRY, key_comments
from ..plugins import detectors
from ..rules import (
    ARCHITECTURE,
    COUNT,
    COUNT_OR_0,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    Choice,
    Context,
    Flag,
    Integer,
    Number,
    Rule,
    Sequence,
    Text,
    Unused,
    check_rules,
    default_rules,
    model_relations,
    model_rules,
)
from ..teacher import AUTOCAST_CHOICES
from .epochs import LAZY_IN_EPOCHS, Steps
from .optimizer import CLIPPERS, optimizer_types
from .settings import distiller_node

_NAME, _SEED = Text(empty=False), Integer(at_most=2**32 - 1)
_NAMES = Sequence(_NAME)
_DECAY = Number(at_least=0, below=1)
_SCHEDULERS = ("WarmupMultiStepLR", "WarmupCosineLR")
_NO_AUG = (
    "test-time augmentation is not part of this package. Evaluate the checkpoint, which holds a plain detectron2 "
    "model, with detectron2's tools/train_net.py --eval-only"
)


@dataclass(frozen=True)
class Optimizer(Rule):
    """A class of torch.optim by name, in any case."""

    def expected(self, value: Any, context: Context) -> str:
        known = {name.lower(): name for name in optimizer_types()}
        if isinstance(value, str) and value.lower() in known:
            return ""
        return Choice(sorted(known.values())).expected(value, context)


def _solver(node: str) -> dict[str, Rule]:
    """The rules that the student's solver and that of losses share."""
    rules: dict[str, Rule] = {
        "OPTIMIZER": Optimizer(),
        "BASE_LR": NOT_NEGATIVE,
        "BASE_LR_END": NOT_NEGATIVE,
        "MOMENTUM": FRACTION,
        "WEIGHT_DECAY": NOT_NEGATIVE,
        "WEIGHT_DECAY_NORM": Number(at_least=0, also=(None,)),
        "WEIGHT_DECAY_BIAS": Number(at_least=0, also=(None,)),
        "BIAS_LR_FACTOR": NOT_NEGATIVE,
        "GAMMA": NOT_NEGATIVE,
        "NUM_DECAYS": COUNT,
        "WARMUP_FACTOR": NOT_NEGATIVE,
        "WARMUP_ITERS": COUNT_OR_0,
        "WARMUP_METHOD": Choice(("linear", "constant")),
        "CLIP_GRADIENTS.CLIP_TYPE": Choice(tuple(CLIPPERS)),
        "CLIP_GRADIENTS.CLIP_VALUE": POSITIVE,
        "CLIP_GRADIENTS.NORM_TYPE": Number(above=0, also=(float("inf"),)),
    }
    return {f"{node}.{name}": rule for name, rule in rules.items()}


def _samplers(context: Context) -> list[str]:
    """Those whose keys the config has."""
    subset = "RANDOM_SUBSET_RATIO" in context.cfg.DATALOADER
    weighted = "TRAIN_REPEAT_FACTOR" in context.cfg.DATASETS
    return [
        "TrainingSampler",
        "RepeatFactorTrainingSampler",
        *["RandomSubsetTrainingSampler"] * subset,
        *["WeightedTrainingSampler", "WeightedCategoryTrainingSampler"] * weighted,
    ]


def _files(split: str) -> Callable[[Context], list[int]]:
    """The number of proposal files: one per dataset, or none."""

    def counts(context: Context) -> list[int]:
        names = context.cfg.DATASETS[split]
        return [len(names)] if context.cfg.MODEL.LOAD_PROPOSALS is True else [len(names), 0]

    return counts


def _keypoints(context: Context) -> list[int]:
    cfg = context.cfg
    return [cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, 0] if cfg.MODEL.KEYPOINT_ON else []


#: Of every run.
COMMON: dict[str, Rule] = {
    "MODEL.WEIGHTS": Text(),
    "OUTPUT_DIR": _NAME,
    "SEED": _SEED,
    "VIS_PERIOD": COUNT_OR_0,
    "INPUT.MIN_SIZE_TEST": COUNT_OR_0,
    "INPUT.MAX_SIZE_TEST": COUNT,
    "INPUT.FIXED_SIZE": Sequence(COUNT, count=(2, 0)),
    "INPUT.MASK_FORMAT": Choice(("polygon", "bitmask")),
    "INPUT.MAPPER": Choice(DATASET_MAPPER_REGISTRY, also=("",)),
    "DATALOADER.NUM_WORKERS": COUNT_OR_0,
    "DATASETS.TEST": Sequence(_NAME, unique=True),
    "DATASETS.PROPOSAL_FILES_TEST": Sequence(_NAME, count=_files("TEST")),
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST": COUNT,
    "DATASETS.CHECK": Choice(("all", "none")),
    "TEST.IMS_PER_BATCH": COUNT,
    "TEST.KEYPOINT_OKS_SIGMAS": Sequence(POSITIVE, count=_keypoints),
    "TEST.EXPECTED_RESULTS": Sequence(Sequence(count=(4,))),
    "TEST.AUG.ENABLED": Unused(False, _NO_AUG),
}

#: Of training.
TRAINING: dict[str, Rule] = {
    "INPUT.MIN_SIZE_TRAIN": Sequence(COUNT_OR_0, least=1, alone=True),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": Choice(("choice", "range")),
    "INPUT.MAX_SIZE_TRAIN": COUNT,
    "INPUT.RANDOM_FLIP": Choice(("horizontal", "vertical", "none")),
    "INPUT.CROP.TYPE": Choice(("relative_range", "relative", "absolute", "absolute_range")),
    "INPUT.CROP.SIZE": Sequence(POSITIVE, count=(2,)),
    "INPUT.AUGMENTATIONS": Choice(AUGMENTATION_REGISTRY, also=("default",)),
    "INPUT.SSD.EXPAND_MAX_RATIO": Number(at_least=1),
    "INPUT.SSD.CROP_MIN_IOUS": Sequence(FRACTION),
    "DATASETS.TRAIN": Sequence(_NAME, least=1, unique=True),
    "DATASETS.PROPOSAL_FILES_TRAIN": Sequence(_NAME, count=_files("TRAIN")),
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN": COUNT,
    "DATASETS.CHECK_IMAGES": COUNT_OR_0,
    "WANDB.PROJECT": _NAME,
    "MLFLOW.EXPERIMENT": _NAME,
    "DATALOADER.SAMPLER_TRAIN": Choice(_samplers),
    "DATALOADER.REPEAT_THRESHOLD": FRACTION,
    "SOLVER.MAX_ITER": COUNT,
    "SOLVER.STEPS": Steps(),
    **dict.fromkeys(IN_EPOCHS.values(), NOT_NEGATIVE),
    "SOLVER.LR_SCHEDULER_NAME": Choice((*_SCHEDULERS, "WarmupStepWithFixedGammaLR")),
    "SOLVER.IMS_PER_BATCH": COUNT,
    "SOLVER.REFERENCE_WORLD_SIZE": COUNT_OR_0,
    "SOLVER.CHECKPOINT_PERIOD": COUNT_OR_0,
    **_solver("SOLVER"),
    "SOLVER.BACKBONE_LR_FACTOR": NOT_NEGATIVE,
    "SOLVER.LAYER_DECAY": Number(above=0, at_most=1),
    "TEST.EVAL_PERIOD": COUNT_OR_0,
    "TEST.PRECISE_BN.NUM_ITER": COUNT,
    "SOLVER.ACCUMULATE": COUNT,
    "SOLVER.EMA": _DECAY,
    "TEST.KEEP_BEST": Text(),
    "TEST.PATIENCE": COUNT_OR_0,
}


#: Of MODEL.DISTILLER; its nodes of losses have LossSettings.
DISTILLATION: dict[str, Rule] = {
    "MODEL.DISTILLER.TYPES": Sequence(Choice(DISTILL_LOSS_REGISTRY), least=1, unique=True),
    "MODEL.DISTILLER.TASK_LOSS_WEIGHT": NOT_NEGATIVE,
    "MODEL.DISTILLER.FREEZE": _NAMES,
    "MODEL.DISTILLER.GRADIENT_RATIO_PERIOD": COUNT_OR_0,
    "MODEL.DISTILLER.MODEL_DISTILLER_CONFIG": _NAME,
    "MODEL.DISTILLER.TEACHER_WEIGHTS": Text(),
    "MODEL.DISTILLER.TEACHER_ALLOW_MISSING": _NAMES,
    "MODEL.DISTILLER.TEACHER_AUTOCAST": Choice(AUTOCAST_CHOICES),
    "MODEL.DISTILLER.TEACHER_CACHE": Text(),
    "MODEL.DISTILLER.TEACHER_CACHE_GB": POSITIVE,
    "MODEL.DISTILLER.PRELOAD_NAMES": _NAMES,
    "MODEL.DISTILLER.PRELOAD_TEACHER": Text(),
    "MODEL.DISTILLER.PRELOAD_TYPE": Choice(("all", "teacher_only")),
    "MODEL.DISTILLER.PRETRAIN_TEACHER_ITERS": COUNT_OR_0,
    "MODEL.DISTILLER.FIX_BACKBONE_BEFORE": COUNT_OR_0,
    "MODEL.DISTILLER.FIX_HEAD_BEFORE": COUNT_OR_0,
    **_solver("MODEL.DISTILLER.SOLVER"),
    "MODEL.DISTILLER.SOLVER.LR_SCHEDULER_NAME": Choice(_SCHEDULERS),
}

#: Of a LazyConfig.
LAZY: dict[str, Rule] = {
    "train.max_iter": COUNT,
    "train.eval_period": COUNT_OR_0,
    "train.checkpointer.period": COUNT_OR_0,
    "train.log_period": COUNT,
    **dict.fromkeys(LAZY_IN_EPOCHS.values(), NOT_NEGATIVE),
    "train.accumulate": COUNT,
    "train.ema": _DECAY,
    "train.fast_kernels": Flag(),
    "train.keep_best": Text(),
    "train.patience": COUNT_OR_0,
    "train.amp.enabled": Flag(),
    "train.seed": _SEED,
    "train.output_dir": _NAME,
    "train.init_checkpoint": Text(),
    "dataloader.train.num_workers": COUNT_OR_0,
    "dataloader.train.total_batch_size": COUNT,
    "dataloader.test.num_workers": COUNT_OR_0,
    "dataloader.test.batch_size": COUNT,
}


def check_keys(cfg: CfgNode, train: bool = True) -> None:
    """Check every key that a run reads, before anything is built or read.

    Args:
        cfg: a complete config, with or without the Distiller.
        train: also the keys of training alone.

    Raises:
        ValueError: a value has a wrong type, is out of range or unknown, or has no effect; the message names
            the key, the value and what was expected.
    """
    relations = functools.partial(_relations, train=train)
    check_rules(Context(student_config(cfg)), run_rules(cfg, train), relations)


def check_student_name(cfg: CfgNode) -> None:
    """Check the name of a student that MODEL.DISTILLER names itself. Raises ValueError."""
    if cfg.MODEL.META_ARCHITECTURE == "Distiller":
        student_config(cfg)  # raises if it is empty
        check_rules(Context(cfg), {"MODEL.DISTILLER.STUDENT_META_ARCH": ARCHITECTURE})


def run_rules(cfg: CfgNode, train: bool = True) -> dict[str, Rule]:
    """The rules of all keys that a run with this config reads; arguments of ``check_keys``."""
    known = (*(name for name, _ in DISTILL_LOSS_REGISTRY), *detectors())
    rules = {**_types(known), **model_rules(Context(student_config(cfg))), **COMMON}
    if train:
        rules.update(TRAINING)
    if cfg.MODEL.META_ARCHITECTURE == "Distiller":
        rules.update(DISTILLATION)
    return rules


def check_lazy_keys(cfg: DictConfig) -> None:
    """The same for what the trainer reads of a LazyConfig; its other parts are Python objects."""
    check_rules(Context(cfg), LAZY, _lazy_relations)
    if "distiller" in cfg:
        node = CfgNode({"MODEL": CfgNode({"DISTILLER": distiller_node(cfg.distiller)})})
        check_rules(Context(node), DISTILLATION)


@functools.lru_cache(maxsize=1)
def _types(known: tuple[str, ...]) -> dict[str, Rule]:
    """The types of all keys that have a default, but for those of losses.

    Args:
        known: names of the losses and detectors that add keys.
    """
    cfg = get_cfg()
    add_distill_config(cfg)
    of_losses = key_comments()
    return {key: rule for key, rule in default_rules(cfg).items() if key not in of_losses}


def _relations(context: Context, train: bool) -> Iterator[str]:
    """What is wrong between keys of a run, a message each."""
    cfg = context.cfg
    yield from model_relations(context)
    splits = ("TRAIN", "TEST") if train else ("TEST",)
    if not cfg.INPUT.MAPPER and not cfg.INPUT.FIXED_SIZE:
        yield from _size_relations(context, splits)
    yield from _proposal_relations(context, splits)
    if cfg.TEST.EXPECTED_RESULTS and not cfg.DATASETS.TEST:
        yield context.wrong("TEST.EXPECTED_RESULTS", "[], since DATASETS.TEST is empty")
    if train:
        yield from _solver_relations(context)
        yield from _best_relations(context)
        if cfg.INPUT.CROP.ENABLED:
            yield from _crop_relations(context)
        if cfg.MODEL.ROI_BOX_HEAD.USE_FED_LOSS and context.has(GeneralizedRCNN):
            for name in cfg.DATASETS.TRAIN:
                if not hasattr(MetadataCatalog.get(name), "class_image_count"):
                    reason = f"the metadata of dataset '{name}' has no class_image_count (LVIS has it)"
                    yield context.wrong("MODEL.ROI_BOX_HEAD.USE_FED_LOSS", f"False, since {reason}")


def _solver_relations(context: Context) -> Iterator[str]:
    node, wrong = context.cfg.SOLVER, context.wrong
    if node.REFERENCE_WORLD_SIZE and node.IMS_PER_BATCH % node.REFERENCE_WORLD_SIZE:
        divisor = f"0, or a divisor of IMS_PER_BATCH, {node.IMS_PER_BATCH}"
        yield wrong("SOLVER.REFERENCE_WORLD_SIZE", divisor)
    if node.LR_SCHEDULER_NAME == "WarmupCosineLR":
        if not node.BASE_LR:
            yield wrong("SOLVER.BASE_LR", "above 0 for WarmupCosineLR")
        elif node.BASE_LR_END > node.BASE_LR:
            yield wrong("SOLVER.BASE_LR_END", f"at most BASE_LR, {node.BASE_LR}, for WarmupCosineLR")
    if node.RESCALE_INTERVAL and node.WARMUP_ITERS >= node.MAX_ITER:
        expected = f"below MAX_ITER, {node.MAX_ITER}, with RESCALE_INTERVAL True"
        yield wrong("SOLVER.WARMUP_ITERS", expected)
    if node.OPTIMIZER.lower() == "sgd" and node.NESTEROV and not node.MOMENTUM:
        yield wrong("SOLVER.NESTEROV", "False, or a MOMENTUM above 0")
    if not node.BACKBONE_LR_FACTOR:
        expected = "above 0. MODEL.BACKBONE.FREEZE_AT fixes layers, and saves the time to train them"
        yield wrong("SOLVER.BACKBONE_LR_FACTOR", expected)


def _best_relations(context: Context) -> Iterator[str]:
    node, names = context.cfg.TEST, context.cfg.DATASETS.TEST
    if node.KEEP_BEST and not names:
        yield context.wrong("TEST.KEEP_BEST", "'', since DATASETS.TEST is empty")
    if (
        node.KEEP_BEST
        and len(names) > 1
        and not node.KEEP_BEST.startswith(tuple(f"{n}/" for n in names))
    ):
        expected = "the metric of one of the datasets"
        yield context.wrong("TEST.KEEP_BEST", f"{expected}, such as '{names[0]}/{node.KEEP_BEST}'")
    if node.PATIENCE and not node.KEEP_BEST:
        yield context.wrong("TEST.PATIENCE", "0, or a metric in TEST.KEEP_BEST, such as 'bbox/AP'")
    if node.PATIENCE and not (node.EVAL_PERIOD or node.EVAL_EPOCHS):
        expected = "0, or evaluations on the way: TEST.EVAL_PERIOD or EVAL_EPOCHS above 0"
        yield context.wrong("TEST.PATIENCE", expected)


def _lazy_relations(context: Context) -> Iterator[str]:
    train = context.cfg.train
    evaluates = train.eval_period or train.get("eval_epochs")
    if train.get("patience") and not (train.get("keep_best") and evaluates):
        yield context.wrong(
            "train.patience", "0, or a metric in train.keep_best and an eval_period above 0"
        )


def _crop_relations(context: Context) -> Iterator[str]:
    size, kind = context.cfg.INPUT.CROP.SIZE, context.cfg.INPUT.CROP.TYPE
    if kind.startswith("relative") and max(size) > 1:
        yield context.wrong("INPUT.CROP.SIZE", f"parts of an image, at most 1, for TYPE '{kind}'")
    if kind.startswith("absolute") and not all(type(side) is int for side in size):
        yield context.wrong("INPUT.CROP.SIZE", f"integers, pixels, for TYPE '{kind}'")
    if kind == "absolute_range" and size[0] > size[1]:
        yield context.wrong("INPUT.CROP.SIZE", "the smallest side, then the largest")


def _size_relations(context: Context, splits: Iterable[str]) -> Iterator[str]:
    node, wrong = context.cfg.INPUT, context.wrong
    for split in splits:
        sizes = node[f"MIN_SIZE_{split}"]
        least = sizes if isinstance(sizes, int) else min(sizes)
        if least > node[f"MAX_SIZE_{split}"]:
            yield wrong(f"INPUT.MAX_SIZE_{split}", f"at least INPUT.MIN_SIZE_{split}, {least}")
    if "TRAIN" not in splits:
        return
    sizes = [node.MIN_SIZE_TRAIN] if isinstance(node.MIN_SIZE_TRAIN, int) else node.MIN_SIZE_TRAIN
    if node.MIN_SIZE_TEST and 0 in sizes:
        expected = "at least 1. To resize no images, 0 here and in MIN_SIZE_TEST"
        yield wrong("INPUT.MIN_SIZE_TRAIN", expected)
    if node.MIN_SIZE_TRAIN_SAMPLING == "range" and (len(sizes) != 2 or sizes[0] > sizes[1]):
        expected = "two numbers, the smallest and the largest, with MIN_SIZE_TRAIN_SAMPLING 'range'"
        yield wrong("INPUT.MIN_SIZE_TRAIN", expected)


def _proposal_relations(context: Context, splits: Iterable[str]) -> Iterator[str]:
    """Files of proposals exist, and are read by the model."""
    model = context.cfg.MODEL
    given = model.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals"
    if model.LOAD_PROPOSALS is not given:
        reason = f"since MODEL.PROPOSAL_GENERATOR.NAME is '{model.PROPOSAL_GENERATOR.NAME}'"
        yield context.wrong("MODEL.LOAD_PROPOSALS", f"{given}, {reason}")
    for split in splits:
        key = f"DATASETS.PROPOSAL_FILES_{split}"
        files = context.value(key)
        if files and not model.LOAD_PROPOSALS:
            yield context.wrong(key, "(), or MODEL.LOAD_PROPOSALS True")
        for name in files if model.LOAD_PROPOSALS else ():
            if "://" not in name and not os.path.isfile(name):
                yield f"{key} names '{name}', which does not exist"
