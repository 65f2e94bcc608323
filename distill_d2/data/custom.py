"""Datasets named in a config (DATASETS.CUSTOM), without code: VOC's, COCO's and YOLO's annotations, and folders
of images without annotations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Callable

from detectron2.data import DatasetCatalog, MetadataCatalog

from .coco import load_coco
from .coco_content import CocoSource
from .custom_entries import check_entry, complete_path, datasets_root, with_absolute_paths
from .images import load_images
from .split import Share
from .voc import VocFolder, load_voc
from .yolo import YoloFolder, find_classes, labels_of, load_yolo

_MOST_LISTED = 20


def register_custom_datasets(entries: Sequence[dict[str, Any]]) -> None:
    """Register the datasets of DATASETS.CUSTOM; registering the same entry again changes nothing.

    Paths and keys are checked here, annotations when they are loaded (``check_datasets``).

    Args:
        entries: dicts, whose keys docs/own_data.md describes. Relative paths are below $DETECTRON2_DATASETS.

    Raises:
        ValueError: an entry has missing or unknown keys, a value out of range, or a name that is
            already taken.
        FileNotFoundError: a folder or file does not exist; the message says what was found.
    """
    for entry in entries:
        check_entry(entry)
        name, content = entry["NAME"], with_absolute_paths(entry)
        if name not in DatasetCatalog.list():
            _REGISTER[entry["FORMAT"]](name, content)
            MetadataCatalog.get(name).custom_entry = content
        elif MetadataCatalog.get(name).get("custom_entry") != content:
            raise ValueError(
                f"DATASETS.CUSTOM: {_describe_taken(name)} called '{name}' exists already; choose "
                f"another NAME for {content}"
            )


def _describe_taken(name: str) -> str:
    entry = MetadataCatalog.get(name).get("custom_entry")
    if entry is None:
        return "a dataset that is not from DATASETS.CUSTOM"
    return f"another dataset, {entry},"


def _require(path: str, name: str, is_there: Callable[[str], bool] = os.path.isdir) -> str:
    if is_there(path):
        return path
    kind = "folder" if is_there is os.path.isdir else "file"
    folder = os.path.dirname(path)
    while folder and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    found = sorted(os.listdir(folder or "."))
    more = f" and {len(found) - _MOST_LISTED} more" if len(found) > _MOST_LISTED else ""
    raise FileNotFoundError(
        f"DATASETS.CUSTOM: dataset '{name}' needs the {kind} '{path}', which does not exist; "
        f"'{folder or '.'}' holds {found[:_MOST_LISTED]}{more}. Relative paths are below "
        f"$DETECTRON2_DATASETS ('{datasets_root()}')"
    )


def _register_voc(name: str, entry: dict[str, Any]) -> None:
    root, classes, split = entry.get("ROOT"), list(entry["CLASSES"]), entry.get("SPLIT")
    if root is None:
        folder = VocFolder(entry["ANNOTATIONS"], entry["IMAGES"], _split(name, split, ""))
    else:
        folder = VocFolder.of_root(root, "")
        folder = replace(folder, split=_split(name, split, os.path.join(root, "ImageSets", "Main")))
    _require(folder.annotations, name)
    _require(folder.images, name)
    DatasetCatalog.register(name, lambda: load_voc(name, folder, classes))
    MetadataCatalog.get(name).set(
        thing_classes=classes,
        dirname=root or os.path.dirname(folder.annotations),
        year=entry.get("YEAR", 2007),
        split=split if isinstance(split, str) else "all",
        voc_folder=folder,
        evaluator_type="pascal_voc",
    )


def _split(name: str, value: Any, lists: str) -> str | Share | None:
    """The list file or share of images that SPLIT names: the path of a list, or its name in the folder
    ``lists`` without .txt."""
    if value is None:
        return None
    if isinstance(value, dict):
        return Share.of_entry(name, value)
    paths = [os.path.join(lists, f"{value}.txt")] if lists else []
    if not lists or value.endswith(".txt"):
        paths.append(complete_path(value))
    found = next(filter(os.path.isfile, paths), paths[0])
    return _require(found, name, os.path.isfile)


def _register_yolo(name: str, entry: dict[str, Any]) -> None:
    images = _require(entry["IMAGES"], name)
    labels = _require(entry["LABELS"], name) if "LABELS" in entry else labels_of(images)
    folder = YoloFolder(images, labels, _split(name, entry.get("SPLIT"), ""))
    classes = list(entry.get("CLASSES", ())) or find_classes(name, folder)
    DatasetCatalog.register(name, lambda: load_yolo(name, folder, classes))
    MetadataCatalog.get(name).set(thing_classes=classes, evaluator_type="coco")


def _register_coco(name: str, entry: dict[str, Any]) -> None:
    json_file, images = _require(entry["JSON"], name, os.path.isfile), _require(entry["IMAGES"], name)
    split = entry.get("SPLIT")
    share = None if split is None else Share.of_entry(name, split)
    classes = tuple(entry["CLASSES"]) if "CLASSES" in entry else None
    source = CocoSource(json_file, images, corners="BOXES" in entry, share=share, classes=classes)
    keypoints, flips = entry.get("KEYPOINTS"), entry.get("FLIPS")
    DatasetCatalog.register(name, lambda: load_coco(name, source, keypoints, flips))
    MetadataCatalog.get(name).set(
        json_file=json_file, image_root=images, coco_source=source, evaluator_type="coco"
    )


def _register_images(name: str, entry: dict[str, Any]) -> None:
    folder = _require(entry["IMAGES"], name)
    DatasetCatalog.register(name, lambda: load_images(name, folder))


_REGISTER = {
    "voc": _register_voc,
    "coco": _register_coco,
    "yolo": _register_yolo,
    "images": _register_images,
}
