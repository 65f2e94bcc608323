"""Find what is wrong with the datasets of a config before training starts."""

from __future__ import annotations

import difflib
import os
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image


def check_datasets(cfg: CfgNode, train: bool = True) -> None:
    """Check all datasets of a run: see ``check_dataset``. Takes seconds, and for COCO as long as
    reading its json once more (about 20 s for train2017).

    Args:
        cfg: a complete config.
        train: also those of DATASETS.TRAIN.

    Raises:
        ValueError, FileNotFoundError: the message names the dataset and what is wrong.
    """
    if train and not cfg.DATASETS.TRAIN:
        raise ValueError("DATASETS.TRAIN is empty; name at least one dataset")
    classes = _classes_key(cfg)
    for name in dict.fromkeys([*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST]):
        check_dataset(name, classes, cfg.DATASETS.CHECK_IMAGES)


def check_dataset(name: str, classes: Optional[Tuple[str, int]], check_images: int) -> None:
    """Check that a dataset is registered, has annotations and images, and fits the model.

    Args:
        classes: config key and value of the model's number of classes; None: not known.
        check_images: decode a random sample of at most this many images.

    Raises:
        ValueError: unknown name, no images, another number of classes, an unreadable image.
        FileNotFoundError: the annotations, or images, do not exist.
    """
    if name not in DatasetCatalog.list():
        close = difflib.get_close_matches(name, DatasetCatalog.list(), n=5)
        raise ValueError(
            f"dataset '{name}' is not registered; the closest names are {close}. Add your own in "
            "DATASETS.CUSTOM (datasets/README.md)"
        )
    try:
        dicts = DatasetCatalog.get(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the annotations of dataset '{name}' do not exist: {error.filename}. "
            f"$DETECTRON2_DATASETS is '{os.getenv('DETECTRON2_DATASETS', 'datasets')}'"
        ) from error
    if not dicts:
        raise ValueError(f"dataset '{name}' has no images")
    things = MetadataCatalog.get(name).get("thing_classes")
    if classes is not None and things is not None and len(things) != classes[1]:
        raise ValueError(
            f"dataset '{name}' has {len(things)} classes ({', '.join(things[:5])}...), but "
            f"{classes[0]} is {classes[1]}"
        )
    files = [record["file_name"] for record in dicts]
    _check_files_exist(name, files)
    sample = random.Random(0).sample(files, min(check_images, len(files)))
    with ThreadPoolExecutor(max_workers=4) as pool:
        list(pool.map(check_image, sample))


def check_image(path: str) -> None:
    """Decode an image. Raises ValueError, naming it, if that fails."""
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"the image '{path}' cannot be read: {error}") from error


class NamedReadErrors:
    """A dataset mapper whose errors name the image they are about."""

    def __init__(self, mapper: Callable[[Dict[str, Any]], Any]):
        self.mapper = mapper

    def __call__(self, record: Dict[str, Any]) -> Any:
        """As the mapper. Raises RuntimeError, with the mapper's own error as its cause."""
        try:
            return self.mapper(record)
        except Exception as error:
            raise RuntimeError(
                f"the image '{record.get('file_name')}' or its annotations cannot be used: "
                f"{type(error).__name__}: {error}"
            ) from error


def _classes_key(cfg: CfgNode) -> Optional[Tuple[str, int]]:
    architecture = cfg.MODEL.META_ARCHITECTURE
    if architecture == "Distiller":
        architecture = cfg.MODEL.DISTILLER.STUDENT_META_ARCH
    if architecture == "RetinaNet":
        return "MODEL.RETINANET.NUM_CLASSES", cfg.MODEL.RETINANET.NUM_CLASSES
    if architecture == "GeneralizedRCNN":
        return "MODEL.ROI_HEADS.NUM_CLASSES", cfg.MODEL.ROI_HEADS.NUM_CLASSES
    return None


def _check_files_exist(name: str, files: Sequence[str]) -> None:
    listings: Dict[str, set] = {}  # one listing per folder: far fewer calls than one per file
    missing: List[str] = []
    for file in files:
        folder, base = os.path.split(file)
        if folder not in listings:
            listings[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if base not in listings[folder]:
            missing.append(file)
    if missing:
        raise FileNotFoundError(
            f"dataset '{name}': {len(missing)} of {len(files)} images do not exist, the first is "
            f"'{missing[0]}'"
        )
