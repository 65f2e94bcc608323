"""The keys, values and paths of entries of DATASETS.CUSTOM."""

from __future__ import annotations

import os
from typing import Any

from .split import Share

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


def check_entry(entry: Any) -> None:
    """Raises ValueError if an entry has missing or unknown keys, or a value out of range."""
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
            entry[key] = complete_path(entry[key])
    split = entry.get("SPLIT")
    if isinstance(split, str) and split.endswith(".txt") and os.path.isfile(complete_path(split)):
        entry["SPLIT"] = complete_path(split)
    return entry


def complete_path(path: str) -> str:
    """Relative paths are below $DETECTRON2_DATASETS."""
    return os.path.abspath(os.path.join(datasets_root(), os.path.expanduser(path)))
