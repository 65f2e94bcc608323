"""Datasets named in a config (DATASETS.CUSTOM), without code: VOC folders, COCO json files and folders of
images without annotations."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any, Callable

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode

from .images import load_images
from .voc import load_voc

logger = logging.getLogger(__name__)

_KEYS = {
    "voc": {"NAME", "FORMAT", "ROOT", "SPLIT", "CLASSES", "YEAR"},
    "coco": {"NAME", "FORMAT", "JSON", "IMAGES", "CLASSES"},
    "images": {"NAME", "FORMAT", "IMAGES"},
}
_OPTIONAL = {"voc": {"YEAR"}, "coco": {"CLASSES"}, "images": set()}
_TEXTS = ("NAME", "ROOT", "SPLIT", "JSON", "IMAGES")
_YEARS = (2007, 2012)
_MOST_LISTED = 20


def datasets_root() -> str:
    """$DETECTRON2_DATASETS, by default ./datasets."""
    return os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))


def register_custom_datasets(entries: Sequence[dict[str, Any]]) -> None:
    """Register the datasets of DATASETS.CUSTOM; registering the same entry again changes nothing.

    Paths and keys are checked here, annotations when they are loaded (``check_datasets``).

    Args:
        entries: dicts {NAME, FORMAT: "voc", ROOT, SPLIT, CLASSES[, YEAR]}, with YEAR 2007 (11-point
            AP, the default) or 2012 (area AP), {NAME, FORMAT: "coco", JSON, IMAGES[, CLASSES]}, or
            {NAME, FORMAT: "images", IMAGES}. Relative paths are below $DETECTRON2_DATASETS.

    Raises:
        ValueError: an entry has missing or unknown keys, a value out of range, or a name that is
            already taken.
        FileNotFoundError: a folder or file does not exist; the message says what was found.
    """
    for entry in entries:
        _check_entry(entry)
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


def _check_entry(entry: Any) -> None:
    if not isinstance(entry, dict):
        raise ValueError(
            f"DATASETS.CUSTOM holds {entry!r}; expected {{NAME: ..., FORMAT: voc, coco or images, ...}}"
        )
    kind = entry.get("FORMAT")
    if kind not in list(_KEYS):
        raise ValueError(
            f"DATASETS.CUSTOM: FORMAT is {kind!r} in {entry}; expected one of {sorted(_KEYS)}"
        )
    unknown = set(entry) - _KEYS[kind]
    missing = _KEYS[kind] - _OPTIONAL[kind] - set(entry)
    if unknown or missing:
        raise ValueError(
            f"DATASETS.CUSTOM: unknown keys {sorted(map(str, unknown))}, missing keys "
            f"{sorted(missing)} in {entry}; a {kind} dataset has {sorted(_KEYS[kind])}, of which "
            f"{sorted(_OPTIONAL[kind]) or 'none'} may be left out"
        )
    _check_values(entry)


def _check_values(entry: dict[str, Any]) -> None:
    for key in _TEXTS:
        if key in entry and not (isinstance(entry[key], str) and entry[key]):
            raise ValueError(f"DATASETS.CUSTOM: {key} is {entry[key]!r} in {entry}; expected a string")
    classes = entry.get("CLASSES", ["any"])
    is_list = isinstance(classes, (list, tuple)) and all(isinstance(name, str) for name in classes)
    if not is_list or not classes or len(set(classes)) < len(classes):
        raise ValueError(
            f"DATASETS.CUSTOM: CLASSES of '{entry['NAME']}' is {classes!r}; expected a list of "
            "different names, in quotes where yaml would read something else (yes, no, numbers)"
        )
    if entry.get("YEAR", 2007) not in _YEARS:
        raise ValueError(
            f"DATASETS.CUSTOM: YEAR of '{entry['NAME']}' is {entry['YEAR']!r}; expected 2007 (11-point "
            "AP) or 2012 (area AP)"
        )


def with_absolute_paths(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of DATASETS.CUSTOM with complete paths, so that equal entries mean equal files."""
    entry = dict(entry)
    for key in ("ROOT", "JSON", "IMAGES"):
        if key in entry:
            entry[key] = os.path.abspath(os.path.join(datasets_root(), os.path.expanduser(entry[key])))
    return entry


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
    root, split, classes = entry["ROOT"], entry["SPLIT"], list(entry["CLASSES"])
    _require(os.path.join(root, "ImageSets", "Main", f"{split}.txt"), name, os.path.isfile)
    _require(os.path.join(root, "Annotations"), name)
    _require(os.path.join(root, "JPEGImages"), name)
    DatasetCatalog.register(name, lambda: load_voc(name, root, split, classes))
    MetadataCatalog.get(name).set(
        thing_classes=classes,
        dirname=root,
        year=entry.get("YEAR", 2007),
        split=split,
        evaluator_type="pascal_voc",
    )


def _register_coco(name: str, entry: dict[str, Any]) -> None:
    json_file = _require(entry["JSON"], name, os.path.isfile)
    images, classes = _require(entry["IMAGES"], name), entry.get("CLASSES")
    DatasetCatalog.register(name, lambda: load_coco(name, json_file, images, classes))
    MetadataCatalog.get(name).set(json_file=json_file, image_root=images, evaluator_type="coco")


def _register_images(name: str, entry: dict[str, Any]) -> None:
    folder = _require(entry["IMAGES"], name)
    DatasetCatalog.register(name, lambda: load_images(name, folder))


_REGISTER = {"voc": _register_voc, "coco": _register_coco, "images": _register_images}


def load_coco(
    name: str, json_file: str, images: str, classes: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """detectron2's dicts of a COCO json; sets the dataset's ``thing_classes`` as a side effect.

    Boxes without area are dropped here; COCO's evaluation still counts them as missed.

    Raises:
        ValueError: it cannot be read, holds no annotation, or other classes than ``classes``.
    """
    try:
        dicts = load_coco_json(json_file, images, name)
        without_area = sum(_drop_without_area(record) for record in dicts)
    except (KeyError, TypeError, AssertionError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(
            f"cannot read '{json_file}' of dataset '{name}' as COCO annotations (with images, "
            f"categories and annotations): {type(error).__name__}: {error}"
        ) from error
    found = list(MetadataCatalog.get(name).thing_classes)
    if classes is not None and list(classes) != found:
        raise ValueError(
            f"dataset '{name}': CLASSES is {list(classes)}, but the categories of '{json_file}', in "
            f"the order of their ids, are {found}"
        )
    if not any(record["annotations"] for record in dicts):
        raise ValueError(
            f"dataset '{name}' has no annotations: '{json_file}' holds {len(dicts)} images and no boxes"
        )
    if without_area:
        logger.warning(f"Dataset '{name}': dropped {without_area} boxes without area")
    return dicts


def _drop_without_area(record: dict[str, Any]) -> int:
    """Drop the boxes (XYWH) that have no area from a record; returns how many."""
    before = record["annotations"]
    assert all(item["bbox_mode"] == BoxMode.XYWH_ABS for item in before)
    record["annotations"] = [item for item in before if min(item["bbox"][2:]) > 0]
    return len(before) - len(record["annotations"])
