"""The checks of datasets before training, for LazyConfigs that have their data in detectron2's usual places."""

from __future__ import annotations

import copy
from typing import Any, Callable

from detectron2.config import instantiate
from omegaconf import DictConfig, OmegaConf

from ..data import DataPlan, check_plan, raised
from ..data.mapper_trial import MapperNeeds
from ..evaluation import try_evaluator
from ..random_state import random_state, set_random_state
from .best import check_metric
from .settings import RunSettings

_CHECK_IMAGES = 500  # as DATASETS.CHECK_IMAGES


def check_lazy_data(
    cfg: DictConfig,
    student: DictConfig,
    train: bool = True,
    told: Callable[[Exception], None] = raised,
) -> None:
    """Check the datasets that dataloader.train.dataset.names and dataloader.evaluator.dataset_name name, with
    the mapper dataloader.train.mapper and the evaluator; what is random afterwards does not change.

    Args:
        student: its part of the config; of parts that are not written as detectron2 writes them, such as
            roi_heads.mask_head, nothing is known.
        train: also the training datasets.
        told: see ``check_plan``.

    Raises:
        ValueError, OSError: see ``check_plan``. dataloader.check is neither "all" nor "none".
    """
    check = OmegaConf.select(cfg, "dataloader.check", default="all")
    if check not in ("all", "none"):
        raise ValueError(f"dataloader.check is {check!r}; expected 'all' or 'none'")
    settings = RunSettings.from_lazy(cfg)
    needs, mapper = _needs(cfg, student), OmegaConf.select(cfg, "dataloader.train.mapper")

    metrics: dict[str, set[str]] = {}

    def try_evaluation(name: str, records: list[dict[str, Any]]) -> None:
        metrics[name] = try_evaluator(
            name,
            records,
            lambda folder: instantiate(_with_folder(cfg.dataloader.evaluator, folder)),
            masks=needs.masks,
            keypoints=needs.keypoints,
        )

    state = random_state()
    check_plan(
        DataPlan(
            train=settings.train_datasets if train else (),
            test=settings.test_datasets,
            keys=("dataloader.train.dataset.names", "dataloader.evaluator.dataset_name"),
            check=settings.check_data,
            check_images=_CHECK_IMAGES,
            need_annotations=False,
            skip_empty=OmegaConf.select(cfg, "dataloader.train.dataset.filter_empty", default=True),
            mapper=None if mapper is None else lambda: instantiate(mapper),
            needs=needs,
            try_evaluation=try_evaluation,
        ),
        told,
    )
    set_random_state(state)
    if train:
        check_metric(
            settings.keep_best, {name: metrics.get(name, set()) for name in settings.test_datasets}
        )


def _needs(cfg: DictConfig, student: DictConfig) -> MapperNeeds:
    mean = OmegaConf.select(student, "pixel_mean")
    mapper = "dataloader.train.mapper"
    task_loss_weights = ("distiller.TASK_LOSS_WEIGHT", "model.task_loss_weight")
    return MapperNeeds(
        instances=all(OmegaConf.select(cfg, key, default=1.0) != 0 for key in task_loss_weights),
        masks=OmegaConf.select(student, "roi_heads.mask_head") is not None,
        keypoints=OmegaConf.select(student, "roi_heads.keypoint_head") is not None,
        num_keypoints=OmegaConf.select(student, "roi_heads.keypoint_head.num_keypoints", default=17),
        channels=None if mean is None else len(mean),
        masks_read=bool(OmegaConf.select(cfg, f"{mapper}.use_instance_mask", default=False)),
        mask_format=OmegaConf.select(cfg, f"{mapper}.instance_mask_format", default="polygon"),
    )


def _with_folder(evaluator: DictConfig, folder: str) -> DictConfig:
    evaluator = copy.deepcopy(evaluator)
    if "output_dir" in evaluator:
        evaluator.output_dir = folder
    return evaluator
