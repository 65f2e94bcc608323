"""Find images on the disk and read them as a training would."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence

import numpy as np
from detectron2.data.detection_utils import read_image

from ..data.images import IMAGE_SUFFIXES, refuse_deep_image
from ..data.walking import walk
from ..mistakes import UnreadableRecord


def find_images(names: Sequence[str], output: str = "") -> list[str]:
    """Paths of images, without repetition.

    Args:
        names: files, folders (with their subfolders) or patterns such as "photos/*.jpg"; files may have any name,
            in folders those count that end as images do.
        output: a folder in which nothing is looked for.

    Raises:
        FileNotFoundError: one of the names finds nothing.
    """
    found: dict[str, None] = {}
    for name in names:
        path = os.path.expanduser(name)
        paths = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not paths:
            raise FileNotFoundError(
                f"IMAGES: '{name}' does not exist; expected a file, a folder or a pattern"
            )
        images = [image for each in paths for image in _images_in(each, output)]
        if not images:
            raise FileNotFoundError(f"IMAGES: '{name}' holds no images ({', '.join(IMAGE_SUFFIXES)})")
        found.update(dict.fromkeys(images))
    return list(found)


def read_bgr(path: str) -> np.ndarray:
    """An image (H, W, 3), uint8, BGR, turned as its EXIF orientation says.

    Raises:
        UnreadableRecord: it cannot be read, or has more than 8 bits per channel; the message names it.
    """
    try:
        refuse_deep_image(path)
        return np.ascontiguousarray(read_image(path, "BGR"))
    except Exception as error:  # Pillow's decoders raise many types
        raise UnreadableRecord(f"the image '{path}' cannot be used: {error}") from error


def _images_in(path: str, output: str) -> list[str]:
    if not os.path.isdir(path):
        return [path]
    left_out = os.path.realpath(output) if output else None
    images: list[str] = []
    for folder, folders, files in walk(path):
        folders[:] = [
            name for name in folders if os.path.realpath(os.path.join(folder, name)) != left_out
        ]
        images += [os.path.join(folder, name) for name in files if name.lower().endswith(IMAGE_SUFFIXES)]
    return sorted(images)
