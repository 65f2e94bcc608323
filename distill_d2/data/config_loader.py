"""The images, and the loader of training, that a config describes."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts

from .augmentation import build_mapper
from .loader import ShieldedLoader, build_train_loader
from .read_errors import NamedReadErrors
from .sampler import ResumableTrainingSampler, sampler_of_config


def training_records(cfg: CfgNode) -> list[dict[str, Any]]:
    """The records of DATASETS.TRAIN that are trained on, detectron2's dicts."""
    least = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    skip_empty = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    return get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=skip_empty,
        min_keypoints=least if skip_empty else 0,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )


def train_loader_of_config(cfg: CfgNode, batch_size: int) -> ShieldedLoader:
    """The loader of DATASETS.TRAIN.

    Args:
        batch_size: images of this process at a time.
    """
    dataset = training_records(cfg)
    sampler = ResumableTrainingSampler(
        sampler_of_config(cfg, dataset),
        batch_size=batch_size,
        wide=[image["width"] > image["height"] for image in dataset]
        if cfg.DATALOADER.ASPECT_RATIO_GROUPING
        else None,
    )
    mapper = NamedReadErrors(build_mapper(cfg, is_train=True))
    return build_train_loader(dataset, mapper, sampler, cfg.DATALOADER.NUM_WORKERS)
