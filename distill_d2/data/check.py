"""Find what is wrong with the datasets of a config before training starts."""

from __future__ import annotations

import difflib
import functools
import os
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import check_image_size, read_image

from .. import plugins
from ..mistakes import UnreadableRecord
from .builtin_voc import builtin_voc_places
from .custom import datasets_root
from .records import check_records

_DECODERS = 4  # threads
_SEED = 0


def check_datasets(cfg: CfgNode, train: bool = True) -> None:
    """Check all datasets of a run: see ``check_dataset``. Call it once, in one process, after all
    datasets are registered.

    It takes seconds, and for COCO as long as reading its json once more (about 20 s for train2017).

    Args:
        cfg: a complete config.
        train: also those of DATASETS.TRAIN.

    Raises:
        ValueError: a dataset does not fit the config or the model; see ``check_dataset``.
        OSError: annotations or images do not exist or cannot be read.
    """
    if train and not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty; name at least one dataset")
    if cfg.DATASETS.CHECK_IMAGES < 0:
        raise ValueError(
            f"DATASETS.CHECK_IMAGES is {cfg.DATASETS.CHECK_IMAGES}; expected 0 (decode none) or more"
        )
    names = {key: getattr(cfg.DATASETS, key) for key in (("TRAIN", "TEST") if train else ("TEST",))}
    for key, datasets in names.items():
        for name in datasets:
            _check_registered(name, f"DATASETS.{key}")
    classes = _classes_key(cfg)
    for name in dict.fromkeys(name for datasets in names.values() for name in datasets):
        trained_on = name in names.get("TRAIN", ())
        check_dataset(
            name,
            classes,
            cfg.DATASETS.CHECK_IMAGES,
            need_annotations=trained_on and _need_annotations(cfg),
            tested=name in names["TEST"],
            need_files=not cfg.INPUT.MAPPER,
        )


def check_dataset(
    name: str,
    classes: tuple[str, int] | None = None,
    check_images: int = 0,
    need_annotations: bool = True,
    tested: bool = False,
    need_files: bool = True,
) -> None:
    """Check that a dataset is registered, has annotations and images, and fits the model.

    Folders are listed to see whether all image files exist: one call per folder, not per file.

    Args:
        name: of the dataset.
        classes: config key and value of the model's number of classes; None: not known.
        check_images: the number of images to decode, at most; the sample is always the same.
        need_annotations: whether at least one image must have an annotation.
        tested: whether an evaluator reads it; see ``check_records``.
        need_files: whether each record must name a file; a user's mapper may do without.

    Raises:
        ValueError: unknown name, no images, no annotations, another number of classes, an image
            that is unreadable or not as large as its annotation says.
        OSError: annotations or images do not exist or cannot be read.
    """
    _check_registered(name, "the list of datasets")
    dicts = _load(name)
    if not dicts:
        raise ValueError(f"dataset '{name}' has no images")
    if need_annotations and not any(record.get("annotations") for record in dicts):
        raise ValueError(
            f"dataset '{name}' has no annotations: {len(dicts)} images and no boxes. Images alone are enough "
            "only for losses on features: with train_distill.py, MODEL.DISTILLER.TASK_LOSS_WEIGHT 0 and "
            "DATALOADER.FILTER_EMPTY_ANNOTATIONS False"
        )
    _check_classes(name, classes)
    check_records(name, dicts, classes and classes[1], tested, need_files)
    named = [record for record in dicts if "file_name" in record]
    local = [record for record in named if "://" not in os.fspath(record["file_name"])]
    _check_files_exist(name, [os.fspath(record["file_name"]) for record in local])
    sample = random.Random(_SEED).sample(local, min(check_images, len(local)))
    with ThreadPoolExecutor(max_workers=_DECODERS) as pool:
        list(pool.map(check_image, sample))


def check_image(record: dict[str, Any]) -> None:
    """Decode the image of a dataset dict as detectron2 does.

    Raises:
        ValueError: the image cannot be read, or its size differs from the annotation's.
    """
    path = os.fspath(record["file_name"])
    try:
        check_image_size({**record, "file_name": path}, read_image(path, format="BGR"))
    except Exception as error:  # Pillow's decoders raise many types
        raise ValueError(f"the image '{path}' cannot be used: {error}") from error


class NamedReadErrors:
    """A dataset mapper whose errors name the image."""

    def __init__(self, mapper: Callable[[dict[str, Any]], Any]):
        self.mapper = mapper

    def __call__(self, record: dict[str, Any]) -> Any:
        """Call the mapper; its errors become an UnreadableRecord, with the original as the cause."""
        try:
            return self.mapper(record)
        except Exception as error:
            raise UnreadableRecord(
                f"the image '{record.get('file_name')}' or its annotations cannot be used: "
                f"{type(error).__name__}: {error}"
            ) from error


def _need_annotations(cfg: CfgNode) -> bool:
    """Whether training needs annotations: for task losses, or because images without are filtered out."""
    distills_alone = (
        cfg.MODEL.META_ARCHITECTURE == "Distiller" and not cfg.MODEL.DISTILLER.TASK_LOSS_WEIGHT
    )
    return not distills_alone or cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS


def _check_registered(name: str, key: str) -> None:
    known = DatasetCatalog.list()
    if name in known:
        return
    custom = [other for other in known if MetadataCatalog.get(other).get("custom_entry")]
    raise ValueError(
        f"{key} names '{name}', which is not registered; the closest names are "
        f"{difflib.get_close_matches(name, known, n=5)}, those of DATASETS.CUSTOM are {custom}. Add "
        "your own in DATASETS.CUSTOM (datasets/README.md)"
    )


def _load(name: str) -> list[dict[str, Any]]:
    try:
        return DatasetCatalog.get(name)
    except FileNotFoundError as error:
        root = datasets_root()
        found = sorted(os.listdir(root))[:20] if os.path.isdir(root) else "does not exist"
        places = builtin_voc_places(name)
        looked = f" (looked for in {places})" if places else ""
        raise FileNotFoundError(
            f"the annotations of dataset '{name}' do not exist: {error.filename or error}{looked}. "
            f"$DETECTRON2_DATASETS, '{root}': {found} (layouts: datasets/README.md)"
        ) from error


def _check_classes(name: str, classes: tuple[str, int] | None) -> None:
    things = MetadataCatalog.get(name).get("thing_classes")
    if classes is None or things is None or len(things) == classes[1]:
        return
    shown = ", ".join(things[:10]) + (", ..." if len(things) > 10 else "")
    raise ValueError(
        f"dataset '{name}' has {len(things)} classes ({shown}), but {classes[0]} is {classes[1]}; set "
        f"it to {len(things)}"
    )


def _classes_key(cfg: CfgNode) -> tuple[str, int] | None:
    keys = [d.num_classes_key for d in plugins.of_student(cfg) if d.num_classes_key]
    return (keys[0], functools.reduce(getattr, keys[0].split("."), cfg)) if keys else None


def _check_files_exist(name: str, files: Sequence[str]) -> None:
    listings: dict[str, set] = {}
    missing: list[str] = []
    for file in files:
        folder, base = os.path.split(file)
        if folder not in listings:
            listings[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if base not in listings[folder]:
            missing.append(file)
    if missing:
        folder = os.path.dirname(missing[0])
        raise FileNotFoundError(
            f"dataset '{name}': {len(missing)} of {len(files)} images do not exist, the first is "
            f"'{missing[0]}'; its folder holds {sorted(listings[folder])[:3]}, {len(listings[folder])} "
            "files in all"
        )
