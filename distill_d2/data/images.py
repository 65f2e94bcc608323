"""Images without annotations: a folder of them."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

#: Endings of image files, lower case.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
IMAGE_SUFFIXES += (".jpe", ".jfif", ".jp2", ".pgm", ".ppm")
_READERS = 8  # threads
_ORIENTATION = 0x0112  # the EXIF tag
_TURNED = (5, 6, 7, 8)  # its values that exchange height and width


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
        for place, _, files in os.walk(folder)
        for file in files
        if file.lower().endswith(IMAGE_SUFFIXES)
    ]
    if not paths:
        raise ValueError(f"dataset '{name}': '{folder}' holds no images ({', '.join(IMAGE_SUFFIXES)})")
    paths.sort()
    with ThreadPoolExecutor(max_workers=_READERS) as pool:
        sizes = list(pool.map(image_size, paths))
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
        raise ValueError(f"the image '{path}' cannot be used: {error}") from error
