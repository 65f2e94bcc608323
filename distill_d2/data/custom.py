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
from .images import load_images
from .split import Share
from .voc import VocFolder, load_voc
from .yolo import YoloFolder, find_classes, labels_of, load_yolo

#: The keys of an entry besides NAME and FORMAT: those that it must have, and others that it may have.
_KEYS = {
    "voc": ({"CLASSES"}, {"ROOT", "ANNOTATIONS", "IMAGES", "SPLIT", "YEAR"}),
    "coco": ({"JSON", "IMAGES"}, {"CLASSES", "SPLIT", "BOXES", "KEYPOINTS", "FLIPS"}),
    "yolo": ({"IMAGES"}, {"LABELS", "CLASSES", "SPLIT"}),
    "images": ({"IMAGES"}, set()),
}
_PATHS = ("ROOT", "JSON", "IMAGES", "ANNOTATIONS", "LABELS")
_VOC_PLACES = ({"ROOT", "SPLIT"}, {"ANNOTATIONS", "IMAGES"}, {"ANNOTATIONS", "IMAGES", "SPLIT"})
_YEARS = (2007, 2012)
_MOST_LISTED = 20


def datasets_root() -> str:
    """$DETECTRON2_DATASETS, by default ./datasets."""
    return os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))


def check_name(name: str, key: str) -> None:
    """Raises ValueError if the folder of results that a dataset's name gives could be outside OUTPUT_DIR.

    Args:
        key: the config key that names it, for the message.
    """
    parts = name.replace("\\", "/").split("/")
    if not name.isprintable() or not {"", ".", ".."}.isdisjoint(parts):
        raise ValueError(
            f"{key} names the dataset {name!r}; results go to a folder of that name, so that it may hold no '..', "
            "'.', empty part or unprintable character"
        )


def register_custom_datasets(entries: Sequence[dict[str, Any]]) -> None:
    """Register the datasets of DATASETS.CUSTOM; registering the same entry again changes nothing.

    Paths and keys are checked here, annotations when they are loaded (``check_datasets``).

    Args:
        entries: dicts, whose keys datasets/README.md describes. Relative paths are below $DETECTRON2_DATASETS.

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
            f"DATASETS.CUSTOM holds {entry!r}; expected {{NAME: ..., FORMAT: {' or '.join(_KEYS)}, ...}}"
        )
    kind = entry.get("FORMAT")
    if kind not in list(_KEYS):
        raise ValueError(
            f"DATASETS.CUSTOM: FORMAT is {kind!r} in {entry}; expected one of {sorted(_KEYS)}"
        )
    needed, optional = _KEYS[kind][0] | {"NAME", "FORMAT"}, _KEYS[kind][1]
    unknown, missing = set(entry) - needed - optional, needed - set(entry)
    if unknown or missing:
        raise ValueError(
            f"DATASETS.CUSTOM: unknown keys {sorted(map(str, unknown))}, missing keys "
            f"{sorted(missing)} in {entry}; a {kind} dataset has {sorted(needed | optional)}, of which "
            f"{sorted(optional) or 'none'} may be left out"
        )
    if kind == "voc" and set(entry) & {"ROOT", "SPLIT", "ANNOTATIONS", "IMAGES"} not in _VOC_PLACES:
        raise ValueError(
            f"DATASETS.CUSTOM: a voc dataset has ROOT and SPLIT, or ANNOTATIONS and IMAGES (SPLIT may be left out "
            f"then); found {entry}"
        )
    _check_values(entry)


def _check_values(entry: dict[str, Any]) -> None:
    for key in ("NAME", *_PATHS):
        if key in entry and not (isinstance(entry[key], str) and entry[key]):
            raise ValueError(f"DATASETS.CUSTOM: {key} is {entry[key]!r} in {entry}; expected a string")
    split, texts = entry.get("SPLIT", {}), entry["FORMAT"] != "coco"
    if not isinstance(split, dict) and not (texts and isinstance(split, str) and split):
        raise ValueError(
            f"DATASETS.CUSTOM: SPLIT is {split!r} in {entry}; expected {'a string or ' * texts}"
            "{FRACTION: [0.0, 0.8], SEED: 1}"
        )
    check_name(entry["NAME"], "DATASETS.CUSTOM")
    if "SPLIT" in entry and isinstance(split, dict):
        Share.of_entry(entry["NAME"], split)
    for key in ("CLASSES", "KEYPOINTS"):
        _check_names(entry, key)
    if entry.get("BOXES", "corners") != "corners":
        raise ValueError(
            f"DATASETS.CUSTOM: BOXES of '{entry['NAME']}' is {entry['BOXES']!r}; expected corners (x0, y0, "
            "x1, y1), or no such key (x, y, width, height)"
        )
    flips = entry.get("FLIPS", [])
    if not isinstance(flips, list) or not all(isinstance(p, list) and len(p) == 2 for p in flips):
        raise ValueError(
            f"DATASETS.CUSTOM: FLIPS of '{entry['NAME']}' is {flips!r}; expected pairs of keypoints, [[a, b], ...]"
        )
    if entry.get("YEAR", 2007) not in _YEARS:
        raise ValueError(
            f"DATASETS.CUSTOM: YEAR of '{entry['NAME']}' is {entry['YEAR']!r}; expected 2007 (11-point "
            "AP) or 2012 (area AP)"
        )


def _check_names(entry: dict[str, Any], key: str) -> None:
    names = entry.get(key, ["any"])
    is_list = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    if not is_list or not names or len(set(names)) < len(names):
        raise ValueError(
            f"DATASETS.CUSTOM: {key} of '{entry['NAME']}' is {names!r}; expected a list of "
            "different names, in quotes where yaml would read something else (yes, no, numbers)"
        )


def with_absolute_paths(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of DATASETS.CUSTOM with complete paths, so that equal entries mean equal files."""
    entry = dict(entry)
    for key in _PATHS:
        if key in entry:
            entry[key] = _complete(entry[key])
    split = entry.get("SPLIT")
    if isinstance(split, str) and split.endswith(".txt") and os.path.isfile(_complete(split)):
        entry["SPLIT"] = _complete(split)
    return entry


def _complete(path: str) -> str:
    return os.path.abspath(os.path.join(datasets_root(), os.path.expanduser(path)))


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
        paths.append(_complete(value))
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
