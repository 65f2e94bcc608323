"""VOC's annotations in a folder, in VOC's own layout or in any other."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from ..data.voc import read_annotation
from .folder import Folder, without_ending
from .parts import Entry, Layout, Parts, layout_of, parts_by_folders

#: Lists of training and of validation images in ImageSets/Main, the first pair that is there.
_LISTS = (("train", "val"), ("trainval", "test"), ("train", "test"))


def find_voc(folder: Folder) -> Layout | None:
    """The layout of xml files that are named as images are; None: there are none.

    Raises:
        ValueError: there are several datasets, or an xml file cannot be read.
    """
    files = folder.ending((".xml",))
    roots = sorted({os.path.dirname(f)[: -len("Annotations")] for f in files if _is_official(folder, f)})
    if len(roots) > 1:
        raise ValueError(
            f"'{folder.root}' holds several VOC datasets, in {roots}; give the folder of one of them"
        )
    parts = _listed(folder, roots[0]) if roots else {}
    parts = parts or parts_by_folders(
        folder, files, lambda xml, images: _voc(ANNOTATIONS=folder.path(xml), IMAGES=folder.path(images))
    )
    return layout_of("voc", parts, folder, _classes(parts)) if parts else None


def _is_official(folder: Folder, file: str) -> bool:
    place = os.path.dirname(file)
    return os.path.basename(place) == "Annotations" and os.path.isdir(
        folder.path(f"{place}/../JPEGImages")
    )


def _listed(folder: Folder, root: str) -> Parts:
    """By the lists in ImageSets/Main; empty without them."""
    place = f"{root}ImageSets/Main/"
    names = {without_ending(f[len(place) :]) for f in folder.files if f.startswith(place)}
    for train, val in _LISTS:
        if {train, val} <= names:
            lists = {"train": train, "val": val}
            parts = {role: [_voc(ROOT=folder.path(root), SPLIT=name)] for role, name in lists.items()}
            return {**parts, "test": parts["val"]} if "test" in names - {val} else parts
    return {}


def _voc(**keys: Any) -> Entry:
    return {"FORMAT": "voc", **keys, "YEAR": 2012}


def _classes(parts: Parts) -> list[str]:
    """Those of all annotations, in the order of the alphabet."""
    found: set[str] = set()
    for entry in [entry for entries in parts.values() for entry in entries]:
        place = entry.get("ANNOTATIONS") or os.path.join(entry["ROOT"], "Annotations")
        found.update(_labels(Folder.read(place)))
    return sorted(found)


def _labels(folder: Folder) -> Iterable[str]:
    for file in folder.ending((".xml",)):
        yield from (item.label for item in read_annotation(folder.path(file)).objects)
