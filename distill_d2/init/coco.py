"""COCO's json files in a folder."""

from __future__ import annotations

import json
import mmap
import os

from ..data.text import read_text
from .folder import Folder, role_of, without_ending
from .parts import Entry, Layout, layout_of

_KEYS = (b'"images"', b'"annotations"', b'"categories"')


def find_coco(folder: Folder) -> Layout | None:
    """The layout of COCO's json files; None: there are none.

    Raises:
        ValueError: it is not clear which file is meant, or the images of one are not in the folder.
    """
    roles: dict[str, list[str]] = {}
    for file in folder.ending((".json",)):
        if _is_coco(folder.path(file)):
            roles.setdefault(role_of(without_ending(file)), []).append(file)
    parts = {role: [_entry(folder, _one_of(folder, role, files))] for role, files in roles.items()}
    return layout_of("coco", parts, folder) if parts else None


def _is_coco(path: str) -> bool:
    """Whether a json names the lists of COCO's annotations of objects; it is not parsed, as others may be huge."""
    if os.path.getsize(path) == 0:
        return False
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return all(content.find(key) >= 0 for key in _KEYS)


def _one_of(folder: Folder, role: str, files: list[str]) -> str:
    """The json of a role: the only one, the one called as the role, or that of COCO's instances."""
    called = [file for file in files if without_ending(os.path.basename(file)) == role]
    instances = [file for file in files if os.path.basename(file).startswith("instances")]
    for names in (files, called, instances):
        if len(names) == 1:
            return names[0]
    raise ValueError(
        f"'{folder.root}' holds {len(files)} COCO files for {role or 'no role (train, val)'}: {files[:8]}; call "
        f"the one that is meant {role or 'train'}.json, or give a folder that holds only that one"
    )


def _entry(folder: Folder, file: str) -> Entry:
    path = folder.path(file)
    try:
        names = [
            image["file_name"].replace("\\", "/") for image in json.loads(read_text(path))["images"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"'{path}' is not COCO's json: {type(error).__name__}: {error}; expected images with a file_name each"
        ) from error
    inside = [
        name[len(folder.root) + 1 :] if name.startswith(f"{folder.root}/") else name for name in names
    ]
    images, count = folder.images_of(inside, os.path.dirname(file))
    if not count:
        is_whole = any(name.startswith("/") or name[1:3] == ":/" for name in names)
        advice = "; a file_name is best a path relative to the folder of images" if is_whole else ""
        raise ValueError(
            f"'{path}' names {len(names)} images, such as {names[:1]}, and none of them is below '{folder.root}'; "
            f"give a folder that holds the json and its images{advice}"
        )
    return {"FORMAT": "coco", "JSON": path, "IMAGES": folder.path(images)}
