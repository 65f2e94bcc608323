"""Check the datasets of a config before training starts."""

from __future__ import annotations

import functools
from typing import Any, Callable

from detectron2.config import CfgNode

from .. import plugins
from .augmentation import build_mapper
from .check import DataPlan, check_plan, raised
from .mapper_trial import MapperNeeds
from .proposals import read_proposals


def check_datasets(
    cfg: CfgNode,
    train: bool = True,
    try_evaluation: Callable[[str, list[dict[str, Any]]], None] | None = None,
    told: Callable[[Exception], None] = raised,
) -> None:
    """Check all datasets of a run: see ``check_plan``. Call it once, in one process, after all datasets are
    registered.

    Args:
        cfg: a complete config.
        train: also those of DATASETS.TRAIN.
        try_evaluation: tries the evaluator of a test dataset, given by name and dicts.
        told: see ``check_plan``.

    Raises:
        ValueError: a dataset does not fit the config or the model; see ``check_plan``.
        OSError: annotations or images do not exist or cannot be read.
    """
    if train and not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty; name at least one dataset")
    if cfg.DATASETS.CHECK_IMAGES < 0:
        raise ValueError(
            f"DATASETS.CHECK_IMAGES is {cfg.DATASETS.CHECK_IMAGES}; expected 0 (decode none) or more"
        )
    for part in ("TRAIN", "TEST")[not train :] if cfg.MODEL.LOAD_PROPOSALS else ():
        for path in cfg.DATASETS[f"PROPOSAL_FILES_{part}"]:
            read_proposals(path)
    plan = DataPlan(
        train=tuple(cfg.DATASETS.TRAIN) if train else (),
        test=tuple(cfg.DATASETS.TEST),
        check=cfg.DATASETS.CHECK == "all",
        check_images=cfg.DATASETS.CHECK_IMAGES,
        classes=_classes_key(cfg),
        need_annotations=_need_annotations(cfg),
        need_files=not cfg.INPUT.MAPPER,
        keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else 0,
        min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE,
        skip_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        mapper=lambda: build_mapper(cfg, is_train=True),
        needs=_needs(cfg),
        try_evaluation=try_evaluation,
    )
    check_plan(plan, told)


def _need_annotations(cfg: CfgNode) -> bool:
    """Whether training needs annotations: for task losses, or because images without are filtered out."""
    distills_alone = (
        cfg.MODEL.META_ARCHITECTURE == "Distiller" and not cfg.MODEL.DISTILLER.TASK_LOSS_WEIGHT
    )
    return not distills_alone or cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS


def _needs(cfg: CfgNode) -> MapperNeeds:
    instances = _need_annotations(cfg)
    truth = plugins.ground_truth(cfg) if instances else set()
    return MapperNeeds(
        instances=instances,
        masks="masks" in truth,
        keypoints="keypoints" in truth,
        segmentation="semantic segmentation" in truth,
        num_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS,
        channels=len(cfg.MODEL.PIXEL_MEAN),
        masks_read=cfg.MODEL.MASK_ON,
        mask_format=cfg.INPUT.MASK_FORMAT,
    )


def _classes_key(cfg: CfgNode) -> tuple[str, int] | None:
    keys = [d.num_classes_key for d in plugins.of_student(cfg) if d.num_classes_key]
    return (keys[0], functools.reduce(getattr, keys[0].split("."), cfg)) if keys else None
