"""YOLO's text files in a folder, with a data.yaml or without."""

from __future__ import annotations

import os
from typing import Any

import yaml

from ..data.text import read_lines, read_text
from ..data.walking import walk
from ..data.yolo import NAMES_FILES, YoloFolder, find_names, labels_of, read_classes
from .folder import Folder, common_folder, without_ending
from .parts import Entry, Layout, Parts, layout_of, parts_by_folders


def find_yolo(folder: Folder) -> Layout | None:
    """The layout that a data.yaml describes, or that of text files with the names of images; None: there are none.

    Raises:
        ValueError: the classes have no names.
    """
    for file in folder.ending((".yaml", ".yml")):
        parts = _parts_of_yaml(folder, file)
        if parts:
            return layout_of("yolo", parts, folder, read_classes(folder.path(file)))
    images = {without_ending(os.path.basename(path)) for path in folder.images}
    files = [f for f in folder.ending((".txt",)) if without_ending(os.path.basename(f)) in images]
    parts = parts_by_folders(
        folder, files, lambda txt, images: _entry(folder.path(images), folder.path(txt))
    )
    if not parts:
        return None
    first = next(iter(parts.values()))[0]
    places = YoloFolder(first["IMAGES"], first.get("LABELS") or labels_of(first["IMAGES"]))
    names = find_names(places)
    if names is None:
        raise ValueError(
            f"'{folder.root}' holds labels of YOLO, and nothing names their classes; add one of "
            f"{list(NAMES_FILES)}, such as a classes.txt with a name per line"
        )
    return layout_of("yolo", parts, folder, read_classes(names))


def _entry(images: str, labels: str) -> Entry:
    named = {} if labels_of(images) == labels else {"LABELS": labels}
    return {"FORMAT": "yolo", "IMAGES": images, **named}


def _parts_of_yaml(folder: Folder, file: str) -> Parts:
    """As a data.yaml with names, train and val says; empty if it is none, or names what does not exist."""
    try:
        content = yaml.safe_load(read_text(folder.path(file)))
    except (yaml.YAMLError, ValueError):
        return {}
    if not isinstance(content, dict) or "names" not in content or not content.get("train"):
        return {}
    parts: Parts = {}
    for role in ("train", "val", "test"):
        value = content.get(role) or (content.get("valid") if role == "val" else None) or []
        values = value if isinstance(value, list) else [value]
        paths = [_find(folder, os.path.dirname(file), content, str(text)) for text in values]
        entries = [_entry_of_path(folder, path) for path in paths]
        if None in entries:
            if role == "test":  # exports name test images that were left out
                continue
            return {}
        if entries:
            parts[role] = [entry for entry in entries if entry]
    return parts


def _find(folder: Folder, place: str, content: dict[str, Any], text: str) -> str:
    """The path that a data.yaml in ``place`` means; "" if it does not exist."""
    base, below = os.path.expanduser(str(content.get("path") or "")), text.replace("\\", "/")
    # Exports are moved, and in those of some programs all paths begin with "../".
    tried = (
        os.path.join(place, base, below),
        os.path.join(place, below),
        os.path.join(place, below.lstrip("./")),
    )
    return next(filter(os.path.exists, map(folder.path, tried)), "")


def _entry_of_path(folder: Folder, path: str) -> Entry | None:
    """The entry of a folder of images, or of a list of them; None if there are no labels."""
    if os.path.isdir(path):
        labels = labels_of(path)
        is_labeled = any(name.endswith(".txt") for _, _, names in walk(labels) for name in names)
        return _entry(path, labels) if is_labeled else None
    if not path.endswith(".txt"):
        return None
    listed = {os.path.basename(line.replace("\\", "/")) for line in read_lines(path)}
    images = [image for image in folder.images if os.path.basename(image) in listed]
    place = folder.path(common_folder(images)) if images else ""
    return {**_entry(place, labels_of(place)), "SPLIT": path} if place else None
