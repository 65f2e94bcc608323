"""The files of a dataset's folder by their ids, and lists of these ids."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence

from .images import IMAGE_SUFFIXES
from .text import read_lines
from .walking import walk

#: The last column of VOC's lists of one class: whether the image shows it (0: difficult).
_LABEL = re.compile(r"(.*\S)\s+(-1|0|1)")


def files_by_id(folder: str, suffixes: Sequence[str]) -> dict[str, list[str]]:
    """The files with these endings (lower case) in a folder and the folders inside it: their paths relative to
    it, with /, by their ids, the paths without the ending. Empty if there is no folder."""
    found: dict[str, list[str]] = {}
    for place, _, files in walk(folder):
        prefix = os.path.relpath(place, folder).replace(os.sep, "/") + "/"
        for file in sorted(files):
            stem, suffix = os.path.splitext(file)
            if suffix.lower() in suffixes:
                path = file if prefix == "./" else prefix + file
                found.setdefault(path[: len(path) - len(suffix)], []).append(path)
    return found


def read_list(file: str, known: Collection[str], folder: str) -> list[str]:
    """The ids of a list, each once.

    A line is an id, which may hold spaces, or the path of an image or annotation; or one of these and further
    columns, as in VOC's lists of one class (-1, 0 or 1). What exists decides which of the two a list holds.

    Args:
        file: UTF-8 or UTF-16.
        known: the ids that exist.
        folder: where they were found.

    Raises:
        ValueError: lines name nothing that exists, or all of them could be ids with and without columns.
    """
    lines = list(dict.fromkeys(read_lines(file)))
    whole = [_known_id(line, known) for line in lines]
    cut = [_known_id(_without_columns(line), known) for line in lines]
    repeats = len(set(cut)) < len(set(whole))  # without what seemed columns lines would be alike
    if None not in whole and None not in cut and whole != cut and not repeats:
        index = next(i for i, key in enumerate(whole) if key != cut[i])
        raise ValueError(
            f"'{file}': the line '{lines[index]}' may be the image '{whole[index]}', or the image '{cut[index]}' "
            "and a further column; both exist, as for all lines. Rename the images, or remove the columns"
        )
    first, second = (whole, cut) if None in cut or None not in whole else (cut, whole)
    found = [key if key is not None else other for key, other in zip(first, second)]
    missing = [line for line, key in zip(lines, found) if key is None]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(lines)} lines of '{file}' name nothing in '{folder}', the first is "
            f"{missing[0]!r}; '{folder}' holds {sorted(known)[:3]}, {len(known)} in all"
        )
    return list(dict.fromkeys(key for key in found if key is not None))


def _without_columns(line: str) -> str:
    labeled = _LABEL.fullmatch(line)
    return labeled[1] if labeled else line.split()[0]


def _known_id(text: str, known: Collection[str]) -> str | None:
    """The id that a text means: itself, or the path of a file."""
    path = text.replace("\\", "/")
    stem, suffix = os.path.splitext(path)
    paths = [text, path, *([stem] if suffix.lower() in (".xml", ".txt", *IMAGE_SUFFIXES) else [])]
    parts = paths[-1].split("/")
    paths += ["/".join(parts[start:]) for start in range(1, len(parts))]
    return next((candidate for candidate in paths if candidate in known), None)
