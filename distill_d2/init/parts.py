"""Parts of a dataset: which files are for training and which for validation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from .folder import Folder, common_folder, role_of, without_ending

#: An entry of DATASETS.CUSTOM without its name.
Entry = dict[str, Any]
#: Entries by role: "train", "val", "test", or "" where nothing says it.
Parts = dict[str, list[Entry]]

#: The share of the images that is trained on, where there is no split, and the seed that shuffles them.
_TRAINED_ON, _SEED = 0.8, 1


@dataclass
class Layout:
    """How a folder holds a dataset.

    Attributes:
        kind: voc, coco or yolo.
        train, val: entries of DATASETS.CUSTOM, without names.
        classes: names of the classes; empty for COCO, whose json holds them.
        remarks: what a user should know of the choice.
    """

    kind: str
    train: list[Entry]
    val: list[Entry]
    classes: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def layout_of(kind: str, parts: Parts, folder: Folder, classes: Iterable[str] = ()) -> Layout:
    """The layout in which ``parts`` are trained on and validated on.

    Raises:
        ValueError: nothing is there to train on.
    """
    remarks = []
    train, val = parts.get("train", parts.get("", [])), parts.get("val", [])
    if not train:
        raise ValueError(
            f"'{folder.root}' holds data for {sorted(parts)} and none for training; call their folder "
            "or file train"
        )
    if "train" in parts and "" in parts:
        remarks.append(f"not used: {_places(parts[''])}, whose path names neither train nor val")
    if not val and "test" in parts:
        val = parts["test"]
        remarks.append("there is no part called val, so test is validated on")
    elif "test" in parts:
        remarks.append("the part called test is left alone")
    if not val or val == train:
        train, val = _shares(train, folder)
        percent = round(100 * _TRAINED_ON)
        remarks.append(
            f"split here: {percent} % for training, {100 - percent} % for validation, seed {_SEED}"
        )
    return Layout(kind, train, val, list(classes), remarks)


def parts_by_folders(folder: Folder, labels: Iterable[str], entry: Callable[[str, str], Entry]) -> Parts:
    """The parts of label files that are named as their images.

    Args:
        entry: of a folder of labels and one of images, relative to the root.
    """
    groups: dict[str, list[str]] = {}
    for file in labels:
        groups.setdefault(role_of(os.path.dirname(file)), []).append(file)
    parts = {}
    for role, files in groups.items():
        place = common_folder(files)
        keys = [without_ending(os.path.relpath(file, place or ".")) for file in files]
        images, count = folder.images_of(keys, place)
        if count:
            parts[role] = [entry(place, images)]
    return parts


def _shares(entries: list[Entry], folder: Folder) -> tuple[list[Entry], list[Entry]]:
    if any("SPLIT" in entry for entry in entries):
        raise ValueError(
            f"'{folder.root}' lists images for training and none for validation; add a list of these, or remove "
            "the list, and the images are split"
        )
    ranges = ([0.0, _TRAINED_ON], [_TRAINED_ON, 1.0])
    train, val = ([{**e, "SPLIT": {"FRACTION": r, "SEED": _SEED}} for e in entries] for r in ranges)
    return train, val


def _places(entries: list[Entry]) -> str:
    return ", ".join(f"'{entry.get('JSON') or entry['IMAGES']}'" for entry in entries)
