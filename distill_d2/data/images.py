"""Images without annotations: a folder of them."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from detectron2.utils.file_io import PathManager
from PIL import Image

from .walking import walk

#: Endings of image files, lower case.
IMAGE_SUFFIXES: tuple[str, ...] = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
IMAGE_SUFFIXES += (".jpe", ".jfif", ".jp2", ".pgm", ".ppm")
#: Advice on images that cannot be used.
SKIPPING = "DATASETS.SKIP_UNREADABLE True (of init: --skip-unreadable) leaves such images out"
_READERS = 8  # threads
_ORIENTATION = 0x0112  # the EXIF tag
_DEEP_MODES = ("I", "F")  # and I;16, I;16B, ...
_TURNED = (5, 6, 7, 8)  # its values that exchange height and width
_unreadable_allowed = contextvars.ContextVar("unreadable_allowed", default=False)


def load_images(name: str, folder: str) -> list[dict[str, Any]]:
    """detectron2's dicts of all images in a folder and its subfolders, without annotations.

    Args:
        name: of the dataset, for messages.
        folder: to search.

    Raises:
        ValueError: there are no images, or a file is not an image.
    """
    paths = [
        os.path.join(place, file)
        for place, _, files in walk(folder)
        for file in files
        if file.lower().endswith(IMAGE_SUFFIXES)
    ]
    if not paths:
        raise ValueError(f"dataset '{name}': '{folder}' holds no images ({', '.join(IMAGE_SUFFIXES)})")
    paths.sort()
    sizes = image_sizes(paths)
    return [
        {
            "file_name": path,
            "image_id": os.path.relpath(path, folder),
            "height": height,
            "width": width,
            "annotations": [],
        }
        for path, (height, width) in zip(paths, sizes)
    ]


def refuse_deep_image(path: str | os.PathLike) -> None:
    """Refuse images of more than 8 bits per channel that detectron2 would not scale: it takes all values above
    255 for 255, and floating-point numbers up to 1 for black. Only the header of others is read.

    Raises:
        ValueError: this is one; the message says its values.
        OSError: it cannot be read.
    """
    with PathManager.open(path, "rb") as file, Image.open(file) as image:
        _refuse_deep(image)


def _refuse_deep(image: Image.Image) -> None:
    if image.mode not in _DEEP_MODES and not image.mode.startswith("I;"):
        return
    pixels = np.asarray(image)
    low, high = float(pixels.min()), float(pixels.max())
    if low >= 0 and high <= 255 and (image.mode != "F" or high > 1 or high == 0):
        return
    raise ValueError(
        f"it has more than 8 bits per channel (mode {image.mode}), with values from {low:g} to {high:g}, of "
        "which detectron2 keeps the whole numbers from 0 to 255; scale it to 8 bits, all images of the "
        "datasets alike, or choose a mapper of your own by INPUT.MAPPER"
    )


def check_image(record: dict[str, Any], deep: bool = False) -> list[str]:
    """Decode the image of a dataset dict, a JPEG at an eighth of its size, and return what detectron2 does not
    show of it: further frames, transparency.

    Args:
        deep: whether it may have more than 8 bits per channel.

    Raises:
        ValueError: the image cannot be read, or its size differs from the annotation's.
    """
    path = os.fspath(record["file_name"])
    try:
        with PathManager.open(path, "rb") as file, Image.open(file) as image:
            turned = image.getexif().get(_ORIENTATION) in _TURNED
            found = (image.width, image.height) if turned else (image.height, image.width)
            image.draft(None, (1, 1))
            image.load()
            if not deep:
                _refuse_deep(image)
            remarks = _remarks(image)
        expected = (record.get("height", found[0]), record.get("width", found[1]))
        if found != expected:
            hint = " The image has an EXIF orientation, which detectron2 applies." if turned else ""
            raise ValueError(f"got (height, width) {found}, expect {expected} of the annotation.{hint}")
        return remarks
    except Exception as error:  # Pillow's decoders raise many types
        raise ValueError(f"the image '{path}' cannot be used: {error}") from error


def _remarks(image: Image.Image) -> list[str]:
    found = []
    # Cameras write photos with a second, small frame (MPO).
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        found.append("have several frames, of which the first is read")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        if np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
            found.append("have transparent pixels, which are read in the color behind them")
    return found


def image_sizes(paths: Sequence[str]) -> list[tuple[int, int]]:
    """Heights and widths as detectron2 reads the images; inside ``unreadable_allowed`` (1, 1) of those that
    cannot be read.

    Raises:
        ValueError: one does not exist, or is not an image.
    """
    allowed = _unreadable_allowed.get()  # a thread has variables of its own
    with ThreadPoolExecutor(max_workers=_READERS) as pool:
        return list(pool.map(lambda path: _size_or_one(path) if allowed else image_size(path), paths))


@contextlib.contextmanager
def unreadable_allowed() -> Iterator[None]:
    """Inside, datasets that take sizes from images load with images that cannot be read."""
    token = _unreadable_allowed.set(True)
    try:
        yield
    finally:
        _unreadable_allowed.reset(token)


def _size_or_one(path: str) -> tuple[int, int]:
    try:
        return image_size(path)
    except ValueError:
        return 1, 1


def image_size(path: str) -> tuple[int, int]:
    """Height and width as detectron2 reads the image.

    Raises:
        ValueError: it does not exist, or is not an image.
    """
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(_ORIENTATION) in _TURNED
            return (image.width, image.height) if turned else (image.height, image.width)
    except (OSError, SyntaxError) as error:  # Pillow's, of a damaged PNG
        raise ValueError(f"the image '{path}' cannot be used: {error}. {SKIPPING}") from error
