"""The files of a folder of data, and which labels belong to which images."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..data.images import IMAGE_SUFFIXES
from ..data.walking import walk
from . import check_data_folder

#: Words in the names of files and folders.
_ROLES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
_SKIPPED = ("__MACOSX", "__pycache__", "node_modules", "site-packages")
_MOST_ENDINGS = 6


@dataclass
class Folder:
    """A folder of data, with the folders inside it; hidden ones are skipped.

    Attributes:
        root: its path.
        files: paths relative to it, with /, sorted.
        images: those of images.
    """

    root: str
    files: list[str]
    images: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.images = self.ending(IMAGE_SUFFIXES)
        self._by_name: dict[str, list[str]] = {}
        for path in self.images:
            for name in {os.path.basename(path), os.path.basename(without_ending(path))}:
                self._by_name.setdefault(name, []).append(path)

    @classmethod
    def read(cls, root: str) -> Folder:
        """Raises FileNotFoundError or NotADirectoryError if it is none."""
        check_data_folder(root)
        files = []
        for place, folders, names in walk(root):
            folders[:] = [f for f in folders if not f.startswith(".") and f not in _SKIPPED]
            inside = os.path.relpath(place, root).replace(os.sep, "/")
            files += [name if inside == "." else f"{inside}/{name}" for name in names if name[0] != "."]
        return cls(os.path.abspath(root), sorted(files))

    def path(self, relative: str) -> str:
        """The absolute path of a file or folder in it."""
        return os.path.normpath(os.path.join(self.root, relative))

    def ending(self, suffixes: Sequence[str]) -> list[str]:
        """The files with these endings (lower case)."""
        return [path for path in self.files if path.lower().endswith(tuple(suffixes))]

    def images_of(self, keys: Iterable[str], near: str) -> tuple[str, int]:
        """The folder below which the images ``keys`` (paths, with or without ending) are found.

        Args:
            near: the folder of their labels; of several folders with as many of the images, one of the same role,
                or this one, is taken.

        Returns:
            the folder, relative to the root, and how many images are there.
        """
        found: Counter[str] = Counter()
        for key in keys:
            paths = self._by_name.get(os.path.basename(key), ())
            found.update({place for path in paths if (place := _above(path, key)) is not None})
        if not found:
            return "", 0
        best = max(
            sorted(found),
            key=lambda place: (found[place], role_of(place) == role_of(near), place == near),
        )
        return best, found[best]

    def describe(self) -> str:
        """What is in it, for messages."""
        endings = Counter(os.path.splitext(path)[1].lower() or "(none)" for path in self.files)
        counts = [f"{count} {ending}" for ending, count in endings.most_common(_MOST_ENDINGS)]
        more = ", ..." if len(endings) > _MOST_ENDINGS else ""
        return f"{len(self.files)} files ({', '.join(counts)}{more})" if counts else "no files"


def without_ending(path: str) -> str:
    return os.path.splitext(path)[0]


def role_of(path: str) -> str:
    """ "train", "val" or "test" by the last word of a path that says it; "" if none does."""
    for word in reversed(re.findall("[a-z]+", path.lower())):
        for role, words in _ROLES.items():
            if word in words:
                return role
    return ""


def common_folder(paths: Sequence[str]) -> str:
    """The innermost folder that holds all of these files; "" is the root."""
    folders = [os.path.dirname(path) for path in paths]
    return os.path.commonpath(folders) if all(folders) else ""


def _above(path: str, key: str) -> str | None:
    """The folder relative to which ``path``, or its id, is ``key``; None: it is another image."""
    for name in (path, without_ending(path)):
        if name == key:
            return ""
        if name.endswith(f"/{key}"):
            return name[: -len(key) - 1]
    return None
