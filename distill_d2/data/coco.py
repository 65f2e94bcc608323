"""Load COCO json files as detectron2's dicts."""

from __future__ import annotations

import collections
import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode
from detectron2.utils.logger import log_first_n

from .coco_content import CocoContent, CocoSource
from .coco_masks import compressed
from .coco_reading import read_coco
from .keypoints import set_keypoint_metadata

_COPIED = ("iscrowd", "bbox", "keypoints", "category_id")


def adopt_coco_datasets(names: Iterable[str]) -> None:
    """Let the datasets of detectron2's ``register_coco_instances`` be read by ``load_coco``."""
    for name in names:
        loader = DatasetCatalog[name] if name in DatasetCatalog else None
        # The function in register_coco_instances; loaders of a user's own stay as they are.
        if loader is not None and loader.__module__ == load_coco_json.__module__:
            source = coco_source(name)
            if source is not None:
                DatasetCatalog.remove(name)
                DatasetCatalog.register(name, lambda name=name, source=source: load_coco(name, source))


def coco_source(name: str) -> CocoSource | None:
    """Where a registered dataset's annotations are; None if its metadata does not name a json."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("coco_source"):
        return metadata.coco_source
    if not metadata.get("json_file"):
        return None
    return CocoSource(os.fspath(metadata.json_file), os.fspath(metadata.get("image_root", "")))


def load_coco(
    name: str,
    source: CocoSource,
    keypoints: Sequence[str] | None = None,
    flips: Sequence[Sequence[str]] | None = None,
) -> list[dict[str, Any]]:
    """detectron2's dicts of a COCO json, as its ``load_coco_json`` makes them of a right one; sets the
    dataset's ``thing_classes``, ids of categories and names of keypoints as a side effect.

    Args:
        name: of the dataset.
        source: the json and the images.
        keypoints: their names, where the json lacks them.
        flips: pairs of those that a horizontal flip exchanges; None: those of "left" and "right".

    Raises:
        ValueError: it cannot be read or corrected, or holds other classes than ``source.classes``.
    """
    found = read_coco(source)
    if found.changes:
        text = f"Dataset '{name}', '{source.json_file}', for training and evaluation: {'; '.join(found.changes)}"
        log_first_n(logging.WARNING, text, key="message")
    categories = sorted(found.content["categories"], key=lambda category: category["id"])
    names = [category["name"] for category in categories]
    if source.classes is not None and list(source.classes) != names:
        raise ValueError(
            f"dataset '{name}': CLASSES is {list(source.classes)}, but the categories of '{source.json_file}', "
            f"in the order of their ids, are {names}"
        )
    metadata = MetadataCatalog.get(name)
    given = metadata.get("thing_classes")
    if given is not None and list(given) != names:
        raise ValueError(
            f"dataset '{name}': thing_classes in its metadata is {list(given)}, but the categories of "
            f"'{source.json_file}', in the order of their ids, are {names}; leave thing_classes out"
        )
    metadata.thing_classes = names if given is None else given
    numbers = {category["id"]: index for index, category in enumerate(categories)}
    metadata.thing_dataset_id_to_contiguous_id = numbers
    set_keypoint_metadata(name, categories, keypoints, flips)
    return _records(found, source, numbers)


def _records(found: CocoContent, source: CocoSource, numbers: dict[Any, int]) -> list[dict[str, Any]]:
    by_image = collections.defaultdict(list)
    for item in found.annotations:
        by_image[item["image_id"]].append(item)
    return [
        {
            "file_name": os.path.join(source.images, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": [_instance(item, numbers) for item in by_image[image["id"]]],
        }
        for image in sorted(found.content["images"], key=lambda image: image["id"])
    ]


def _instance(item: dict[str, Any], numbers: dict[Any, int]) -> dict[str, Any]:
    found = {key: item[key] for key in _COPIED if key in item}
    found["bbox_mode"] = BoxMode.XYWH_ABS
    found["category_id"] = numbers[item["category_id"]]
    mask = item.get("segmentation")
    if mask:
        found["segmentation"] = compressed(mask) if isinstance(mask, dict) else mask
    if item.get("keypoints"):
        # COCO's keypoints are indices of pixels, detectron2's coordinates: a pixel's center is at 0.5.
        found["keypoints"] = [x + 0.5 * (i % 3 != 2) for i, x in enumerate(item["keypoints"])]
    return found
