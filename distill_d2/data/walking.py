"""Folders of data, which may hold links to others."""

from __future__ import annotations

import os
from collections.abc import Iterator


def walk(root: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """``os.walk`` that follows links to folders, and comes to each folder once, wherever links lead."""
    seen: set[str] = set()
    for place, folders, files in os.walk(root, followlinks=True):
        folders.sort()
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield place, folders, files
