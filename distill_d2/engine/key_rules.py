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
from ..losses import DISTILL_LOSS_REGISTRY, key_comments
from ..plugins import detectors
from ..rules import (
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
from .optimizer import CLIPPERS, optimizer_types
from .settings import distiller_node

_NAMES = Sequence(Text(empty=False), unique=True)
_WARMUP = Choice(("linear", "constant"))


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
        "WARMUP_METHOD": _WARMUP,
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
    "OUTPUT_DIR": Text(empty=False),
    "SEED": Integer(at_most=2**32 - 1),
    "VIS_PERIOD": COUNT_OR_0,
    "INPUT.MIN_SIZE_TEST": COUNT_OR_0,
    "INPUT.MAX_SIZE_TEST": COUNT,
    "INPUT.FIXED_SIZE": Sequence(COUNT, count=(2, 0)),
    "INPUT.MASK_FORMAT": Choice(("polygon", "bitmask")),
    "INPUT.MAPPER": Choice(DATASET_MAPPER_REGISTRY, also=("",)),
    "DATALOADER.NUM_WORKERS": COUNT_OR_0,
    "DATASETS.TEST": _NAMES,
    "DATASETS.PROPOSAL_FILES_TEST": Sequence(Text(empty=False), count=_files("TEST")),
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST": COUNT,
    "DATASETS.CHECK": Choice(("all", "none")),
    "TEST.KEYPOINT_OKS_SIGMAS": Sequence(POSITIVE, count=_keypoints),
    "TEST.EXPECTED_RESULTS": Sequence(Sequence(count=(4,))),
    "TEST.AUG.ENABLED": Unused(
        False,
        "test-time augmentation is not part of this package. Evaluate the checkpoint, which holds a plain "
        "detectron2 model, with detectron2's tools/train_net.py --eval-only",
    ),
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
    "DATASETS.TRAIN": Sequence(Text(empty=False), least=1, unique=True),
    "DATASETS.PROPOSAL_FILES_TRAIN": Sequence(Text(empty=False), count=_files("TRAIN")),
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN": COUNT,
    "DATASETS.CHECK_IMAGES": COUNT_OR_0,
    "DATALOADER.SAMPLER_TRAIN": Choice(_samplers),
    "DATALOADER.REPEAT_THRESHOLD": FRACTION,
    "SOLVER.MAX_ITER": COUNT,
    "SOLVER.STEPS": Sequence(COUNT_OR_0, rising=True),
    "SOLVER.LR_SCHEDULER_NAME": Choice(
        ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR")
    ),
    "SOLVER.IMS_PER_BATCH": COUNT,
    "SOLVER.REFERENCE_WORLD_SIZE": COUNT_OR_0,
    "SOLVER.CHECKPOINT_PERIOD": COUNT_OR_0,
    **_solver("SOLVER"),
    "TEST.EVAL_PERIOD": COUNT_OR_0,
    "TEST.PRECISE_BN.NUM_ITER": COUNT,
}


#: Of MODEL.DISTILLER; its nodes of losses have LossSettings.
DISTILLATION: dict[str, Rule] = {
    "TYPES": Sequence(
        Choice(lambda context: sorted(name for name, _ in DISTILL_LOSS_REGISTRY)), least=1, unique=True
    ),
    "TASK_LOSS_WEIGHT": NOT_NEGATIVE,
    "FREEZE": Sequence(Text(empty=False)),
    "MODEL_DISTILLER_CONFIG": Text(empty=False),
    "TEACHER_WEIGHTS": Text(),
    "TEACHER_ALLOW_MISSING": Sequence(Text(empty=False)),
    "TEACHER_AUTOCAST": Choice(AUTOCAST_CHOICES),
    "PRELOAD_NAMES": Sequence(Text(empty=False)),
    "PRELOAD_TEACHER": Text(),
    "PRELOAD_TYPE": Choice(("all", "teacher_only")),
    "PRETRAIN_TEACHER_ITERS": COUNT_OR_0,
    "FIX_BACKBONE_BEFORE": COUNT_OR_0,
    "FIX_HEAD_BEFORE": COUNT_OR_0,
    **_solver("SOLVER"),
    "SOLVER.LR_SCHEDULER_NAME": Choice(("WarmupMultiStepLR", "WarmupCosineLR")),
}

#: Of a LazyConfig.
LAZY: dict[str, Rule] = {
    "train.max_iter": COUNT,
    "train.eval_period": COUNT_OR_0,
    "train.checkpointer.period": COUNT_OR_0,
    "train.log_period": COUNT,
    "train.amp.enabled": Flag(),
    "train.seed": Integer(at_most=2**32 - 1),
    "train.output_dir": Text(empty=False),
    "train.init_checkpoint": Text(),
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


def run_rules(cfg: CfgNode, train: bool = True) -> dict[str, Rule]:
    """The rules of all keys that a run with this config reads; arguments of ``check_keys``."""
    known = (*(name for name, _ in DISTILL_LOSS_REGISTRY), *detectors())
    rules = {**_types(known), **model_rules(Context(student_config(cfg))), **COMMON}
    if train:
        rules.update(TRAINING)
    if cfg.MODEL.META_ARCHITECTURE == "Distiller":
        rules.update({f"MODEL.DISTILLER.{name}": rule for name, rule in DISTILLATION.items()})
    return rules


def check_lazy_keys(cfg: DictConfig) -> None:
    """The same for what the trainer reads of a LazyConfig; its other parts are Python objects."""
    check_rules(Context(cfg), LAZY)
    if "distiller" in cfg:
        node = CfgNode({"MODEL": CfgNode({"DISTILLER": distiller_node(cfg.distiller)})})
        rules = {f"MODEL.DISTILLER.{name}": rule for name, rule in DISTILLATION.items()}
        check_rules(Context(node), rules)


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
        yield from _size_relations(cfg.INPUT, splits)
    yield from _proposal_relations(cfg, splits)
    results = cfg.TEST.EXPECTED_RESULTS
    if results and not cfg.DATASETS.TEST:
        yield f"TEST.EXPECTED_RESULTS is {results!r}, but DATASETS.TEST is empty; expected []"
    if not train:
        return
    crop, solver = cfg.INPUT.CROP, cfg.SOLVER
    if solver.REFERENCE_WORLD_SIZE and solver.IMS_PER_BATCH % solver.REFERENCE_WORLD_SIZE:
        yield (
            f"SOLVER.REFERENCE_WORLD_SIZE is {solver.REFERENCE_WORLD_SIZE}; expected 0, or a divisor of "
            f"IMS_PER_BATCH, {solver.IMS_PER_BATCH}"
        )
    if crop.ENABLED and crop.TYPE.startswith("relative") and max(crop.SIZE) > 1:
        yield f"INPUT.CROP.SIZE is {crop.SIZE}; expected parts of an image, at most 1 for TYPE '{crop.TYPE}'"
    if crop.ENABLED and crop.TYPE.startswith("absolute") and not all(type(n) is int for n in crop.SIZE):
        yield f"INPUT.CROP.SIZE is {crop.SIZE}; expected integers, pixels, for TYPE '{crop.TYPE}'"
    if crop.ENABLED and crop.TYPE == "absolute_range" and crop.SIZE[0] > crop.SIZE[1]:
        yield f"INPUT.CROP.SIZE is {crop.SIZE}; expected the smallest side, then the largest"
    cosine = solver.LR_SCHEDULER_NAME == "WarmupCosineLR"
    if cosine and not (solver.BASE_LR and solver.BASE_LR_END <= solver.BASE_LR):
        yield (
            f"SOLVER.BASE_LR is {solver.BASE_LR} and BASE_LR_END {solver.BASE_LR_END}; expected a BASE_LR above "
            "0, and an end that is not above it, for WarmupCosineLR"
        )
    if solver.RESCALE_INTERVAL and solver.WARMUP_ITERS >= solver.MAX_ITER:
        yield (
            f"SOLVER.WARMUP_ITERS is {solver.WARMUP_ITERS}; expected below MAX_ITER, {solver.MAX_ITER}, with "
            "RESCALE_INTERVAL True"
        )
    if cfg.MODEL.ROI_BOX_HEAD.USE_FED_LOSS and context.has(GeneralizedRCNN):
        for name in cfg.DATASETS.TRAIN:
            if not hasattr(MetadataCatalog.get(name), "class_image_count"):
                yield (
                    f"MODEL.ROI_BOX_HEAD.USE_FED_LOSS is True; expected False, since the metadata of dataset "
                    f"'{name}' has no class_image_count (LVIS has it)"
                )
    if solver.OPTIMIZER.lower() == "sgd" and solver.NESTEROV and not solver.MOMENTUM:
        yield "SOLVER.NESTEROV is True; expected False, or a MOMENTUM above 0"


def _size_relations(node: CfgNode, splits: Iterable[str]) -> Iterator[str]:
    for split in splits:
        sizes, largest = node[f"MIN_SIZE_{split}"], node[f"MAX_SIZE_{split}"]
        sizes = [sizes] if isinstance(sizes, int) else list(sizes)
        if min(sizes) > largest:
            yield (
                f"INPUT.MAX_SIZE_{split} is {largest}; expected at least INPUT.MIN_SIZE_{split}, {min(sizes)}: an "
                "image's longest side is not below its shortest"
            )
    if "TRAIN" not in splits:
        return
    sizes = node.MIN_SIZE_TRAIN
    if node.MIN_SIZE_TEST and (sizes == 0 or not isinstance(sizes, int) and 0 in sizes):
        yield (
            f"INPUT.MIN_SIZE_TRAIN is {sizes}; expected at least 1. To resize no images, 0 here and in "
            "MIN_SIZE_TEST"
        )
    if node.MIN_SIZE_TRAIN_SAMPLING == "range":
        if isinstance(sizes, int) or len(sizes) != 2 or sizes[0] > sizes[1]:
            yield (
                f"INPUT.MIN_SIZE_TRAIN is {sizes}; expected two numbers, the smallest and the largest, with "
                "MIN_SIZE_TRAIN_SAMPLING 'range'"
            )


def _proposal_relations(cfg: CfgNode, splits: Iterable[str]) -> Iterator[str]:
    """Files of proposals exist, and are read by the model."""
    given = cfg.MODEL.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals"
    if cfg.MODEL.LOAD_PROPOSALS is not given:
        yield (
            f"MODEL.LOAD_PROPOSALS is {cfg.MODEL.LOAD_PROPOSALS}; expected {given}, since "
            f"MODEL.PROPOSAL_GENERATOR.NAME is '{cfg.MODEL.PROPOSAL_GENERATOR.NAME}' (files of proposals are for "
            "'PrecomputedProposals')"
        )
    for split in splits:
        names = cfg.DATASETS[f"PROPOSAL_FILES_{split}"]
        if names and not cfg.MODEL.LOAD_PROPOSALS:
            yield f"DATASETS.PROPOSAL_FILES_{split} is {names!r}, which needs MODEL.LOAD_PROPOSALS True"
        for name in names if cfg.MODEL.LOAD_PROPOSALS else ():
            if "://" not in name and not os.path.isfile(name):
                yield f"DATASETS.PROPOSAL_FILES_{split} names '{name}', which does not exist"
