"""Names of classes: the same number means the same class only if names and order agree."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from .custom import datasets_root


def classes_of(names: Sequence[str]) -> list[str] | None:
    """The classes of the first of these datasets that has been loaded and has any; None: not known."""
    known = set(DatasetCatalog.list())
    found = (MetadataCatalog.get(name).get("thing_classes") for name in names if name in known)
    return next((list(classes) for classes in found if classes), None)


def moved_class(classes: Sequence[str], others: Sequence[str]) -> str:
    """Describe the first class that has another number in ``others``; "" if there is none. Upper case, hyphens,
    underscores and spaces make no difference."""
    numbers = {_plain(name): number for number, name in enumerate(others)}
    for number, name in enumerate(classes):
        other = numbers.get(_plain(name), number)
        if other != number:
            return f"'{name}' is class {number} of the first and class {other} of the second"
    return ""


def renamed_classes(classes: Sequence[str], others: Sequence[str]) -> list[str]:
    """Pairs of different names that have the same number, such as "car / lorry"."""
    pairs = zip(classes, others)
    return [f"{first} / {second}" for first, second in pairs if _plain(first) != _plain(second)]


def _plain(name: Any) -> str:
    return str(name).lower().replace("-", " ").replace("_", " ").strip()


def classes_of_config(cfg: CfgNode) -> list[str] | None:
    """The classes that the detector of a config was trained on, from DATASETS.CUSTOM or a registered dataset of
    DATASETS.TRAIN; None: not known. Nothing is registered or loaded."""
    if not cfg.DATASETS.TRAIN:
        return None
    name = cfg.DATASETS.TRAIN[0]
    entries = [entry for entry in cfg.DATASETS.get("CUSTOM", ()) if isinstance(entry, dict)]
    entry = next((entry for entry in entries if entry.get("NAME") == name), None)
    if entry is None:
        return classes_of([name])
    if entry.get("CLASSES"):
        return [str(label) for label in entry["CLASSES"]]
    path = os.path.join(datasets_root(), os.path.expanduser(str(entry.get("JSON", ""))))
    return _categories(path) if entry.get("FORMAT") == "coco" and os.path.isfile(path) else None


def _categories(json_file: str) -> list[str] | None:
    """The names of a COCO json's categories by their ids, without reading the rest of it; None: not found."""
    try:
        with (
            open(json_file, "rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            start = content.find(b"[", content.find(b'"categories"'))
            text = content[start : start + (1 << 20)].decode("utf-8", errors="ignore")
        items, _ = json.JSONDecoder().raw_decode(text)
        return [item["name"] for item in sorted(items, key=lambda item: item["id"])] or None
    except (ValueError, KeyError, TypeError, OSError):
        return None
