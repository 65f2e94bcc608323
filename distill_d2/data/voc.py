"""Read annotations in VOC layout, also incomplete ones that other tools write."""

from __future__ import annotations

import logging
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.structures import BoxMode

logger = logging.getLogger(__name__)

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass
class VocObject:
    """One object of an xml file.

    Attributes:
        label: its class.
        corners: xmin, ymin, xmax, ymax as in the file: pixels count from 1, the last one is inside.
        difficult: whether it counts neither as found nor as missed.
    """

    label: str
    corners: tuple[float, float, float, float]
    difficult: bool = False


@dataclass
class VocImage:
    """Content of an xml file: the size in pixels, the objects, and the number of boxes without area."""

    width: int
    height: int
    objects: list[VocObject]
    without_area: int


def read_split(file: str) -> list[str]:
    """The image ids in ImageSets/Main/<split>.txt, each once; further columns are ignored."""
    with open(file, encoding="utf-8") as lines:
        return list(dict.fromkeys(line.split()[0] for line in lines if line.strip()))


def read_annotation(file: str) -> VocImage:
    """Read an xml file of Annotations/.

    Raises:
        ValueError: the file does not exist, is not xml, or lacks a size, a name or a number.
    """
    try:
        tree = ElementTree.parse(file)
        width, height = (int(float(_text(tree, f"size/{side}"))) for side in ("width", "height"))
        if width < 1 or height < 1:
            raise ValueError(f"the image's size is {width} x {height}")
        found = [_read_object(element, width, height) for element in tree.findall("object")]
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"cannot read the VOC annotation '{file}': {error}") from error
    objects = [item for item in found if item is not None]
    return VocImage(width, height, objects, len(found) - len(objects))


def _read_object(element: ElementTree.Element, width: int, height: int) -> VocObject | None:
    """The object; None if its box, clipped to the image, has no area."""
    x1, y1, x2, y2 = (float(_text(element, f"bndbox/{corner}")) for corner in _CORNERS)
    if x2 <= max(x1, 0) or y2 <= max(y1, 0) or x1 > width or y1 > height:
        return None
    difficult = float(element.findtext("difficult") or 0) != 0
    return VocObject(_text(element, "name"), (x1, y1, x2, y2), difficult)


def _text(element: Any, path: str) -> str:
    text = (element.findtext(path) or "").strip()
    if not text:
        raise ValueError(f"it has no <{path.replace('/', '><')}>, or an empty one")
    return text


def load_voc(name: str, root: str, split: str, classes: Sequence[str]) -> list[dict[str, Any]]:
    """detectron2's dicts of a VOC folder: Annotations/, ImageSets/Main/<split>.txt, JPEGImages/.

    Like detectron2's ``load_voc_instances``, but it also reads splits of one image and other suffixes
    than .jpg, its errors name the file, and it drops boxes without area.

    Raises:
        ValueError: an annotation cannot be read, or has a class that is not in ``classes``; the
            split holds no box.
    """
    ids = read_split(os.path.join(root, "ImageSets", "Main", f"{split}.txt"))
    images = [read_annotation(os.path.join(root, "Annotations", f"{key}.xml")) for key in ids]
    if not any(image.objects for image in images):
        raise ValueError(
            f"dataset '{name}' has no annotations: '{root}', split '{split}', holds {len(ids)} images "
            "and no boxes"
        )
    _check_classes(name, ids, images, classes)
    without_area = sum(image.without_area for image in images)
    if without_area:
        logger.warning(f"Dataset '{name}': dropped {without_area} boxes without area")
    folder = os.path.join(root, "JPEGImages")
    files = _image_files(folder)
    return [
        {
            "file_name": os.path.join(folder, files.get(key, f"{key}.jpg")),
            "image_id": key,
            "height": image.height,
            "width": image.width,
            "annotations": [_instance(item, classes) for item in image.objects],
        }
        for key, image in zip(ids, images)
    ]


def _image_files(folder: str) -> dict[str, str]:
    """{image id: file name}; empty without the folder, because missing files are reported elsewhere."""
    files = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    named = [(os.path.splitext(file), file) for file in files]
    return {key: file for (key, suffix), file in named if suffix.lower() in _IMAGE_SUFFIXES}


def _check_classes(
    name: str, ids: Sequence[str], images: Sequence[VocImage], classes: Sequence[str]
) -> None:
    first_image: dict[str, str] = {}
    for key, image in zip(ids, images):
        for item in image.objects:
            first_image.setdefault(item.label, key)
    unknown = sorted(set(first_image) - set(classes))
    if unknown:
        raise ValueError(
            f"dataset '{name}': the annotations hold classes {unknown} (the first is in "
            f"'{first_image[unknown[0]]}.xml') that are not in CLASSES {list(classes)}; the "
            f"annotations hold {sorted(first_image)}"
        )
    absent = [label for label in classes if label not in first_image]
    if absent:
        logger.warning(f"Dataset '{name}': no box of {absent}")


def _instance(item: VocObject, classes: Sequence[str]) -> dict[str, Any]:
    x1, y1, x2, y2 = item.corners
    # Pixels count from 1, and the last one belongs to the box.
    box = [x1 - 1.0, y1 - 1.0, x2, y2]
    label = list(classes).index(item.label)
    return {"category_id": label, "bbox": box, "bbox_mode": BoxMode.XYXY_ABS}
