"""Names of classes: the same number means the same class only if names and order agree."""

from __future__ import annotations

import json
import logging
import mmap
import os
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from .custom_entries import datasets_root

logger = logging.getLogger(__name__)


def classes_of(names: Sequence[str]) -> list[str] | None:
    """The classes of the first of these datasets that has been loaded and has any; None: not known."""
    known = set(DatasetCatalog.list())
    found = (MetadataCatalog.get(name).get("thing_classes") for name in names if name in known)
    return next((list(classes) for classes in found if classes), None)


def classes_in(checkpoint: Mapping[str, Any]) -> list[str] | None:
    """The classes that a checkpoint's model was trained on, from its entry "metadata"; None: not known."""
    metadata = checkpoint.get("metadata")
    classes = metadata.get("thing_classes") if isinstance(metadata, Mapping) else None
    is_list = isinstance(classes, (list, tuple)) and all(isinstance(name, str) for name in classes)
    return list(classes) if is_list and classes else None


def moved_class(classes: Sequence[str] | None, others: Sequence[str] | None) -> str:
    """Describe the first class that has another number in ``others``; "" if there is none, or one of them is not
    known. Upper case, hyphens, underscores and spaces make no difference."""
    numbers = {_plain(name): number for number, name in enumerate(others or ())}
    for number, name in enumerate(classes or ()):
        other = numbers.get(_plain(name), number)
        if other != number:
            return f"'{name}' is class {number} of the first and class {other} of the second"
    return ""


def check_same_classes(
    first: str, classes: Sequence[str] | None, second: str, others: Sequence[str] | None, advice: str
) -> None:
    """Compare classes by name and order. Nothing is known of None. Other names for the same numbers are logged.

    Args:
        first, second: what has these classes, for messages.
        advice: what to do.

    Raises:
        ValueError: a class has different numbers, or one of them has fewer classes.
    """
    if classes is None or others is None or list(classes) == list(others):
        return
    moved = moved_class(classes, others)
    if moved or len(classes) != len(others):
        missing = [name for name in classes if _plain(name) not in map(_plain, others)]
        lacks = f"; the second lacks {missing[:10]}" if missing else ""
        raise ValueError(
            f"{first} and {second} have different classes: {listing(classes)} and {listing(others)}"
            f"{': ' if moved else ''}{moved}{lacks}. A class is known by its number, its place in this list "
            f"alone. {advice}"
        )
    renamed = [f"{a} / {b}" for a, b in zip(classes, others) if _plain(a) != _plain(b)]
    if renamed:
        logger.warning(
            f"{first[0].upper()}{first[1:]} and {second} name {len(renamed)} classes of the same number "
            f"differently: {', '.join(renamed[:10])}. Only numbers count"
        )


def listing(names: Sequence[str]) -> str:
    """How many there are, and the first ten."""
    return f"{len(names)} ({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})"


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
