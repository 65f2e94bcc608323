"""Read annotations in VOC layout, also incomplete ones that other tools write."""

from __future__ import annotations

import logging
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.logger import log_first_n

from .images import IMAGE_SUFFIXES
from .lists import files_by_id, read_list
from .split import Share

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_DECLARATION = re.compile(rb"^\s*<\?xml[^>]*?encoding\s*=\s*[\"']([\w.-]+)[\"']")


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
    """Content of an xml file: the size in pixels, the objects, the number of boxes without area, and the name
    of the image file, "" if it is not there."""

    width: int
    height: int
    objects: list[VocObject]
    without_area: int
    file_name: str = ""


@dataclass(frozen=True)
class VocFolder:
    """Where the files of a dataset are.

    Attributes:
        annotations: a folder of xml files, of any depth; the id of an image is the path of its xml file in it,
            without the ending.
        images: a folder of images, named by the ids.
        split: a file that lists ids, a share of all, or None: all.
        left_out: ids that do not count, since their images cannot be read.
    """

    annotations: str
    images: str
    split: str | Share | None = None
    left_out: frozenset[str] = frozenset()

    @classmethod
    def of_root(cls, root: str, split: str | Share) -> VocFolder:
        """The folders and the list (``split`` names it) below ``root`` in VOC's own layout."""
        if isinstance(split, str):
            split = os.path.join(root, "ImageSets", "Main", f"{split}.txt")
        return cls(os.path.join(root, "Annotations"), os.path.join(root, "JPEGImages"), split)

    @classmethod
    def of_dataset(cls, name: str) -> VocFolder:
        """Of a registered dataset. Raises ValueError if its metadata does not say it."""
        metadata = MetadataCatalog.get(name)
        lacking = [
            key for key in ("dirname", "split", "year", "thing_classes") if metadata.get(key) is None
        ]
        if lacking:
            raise ValueError(
                f"dataset '{name}' has evaluator_type 'pascal_voc', but its metadata lacks {lacking}; expected "
                "those of detectron2's register_pascal_voc"
            )
        folder = metadata.get("voc_folder") or cls.of_root(metadata.dirname, metadata.split)
        return replace(folder, left_out=metadata.get("left_out", frozenset()))

    def ids(self) -> list[str]:
        """The ids of the images, each once.

        Raises:
            ValueError: the list names what does not exist, or may be read in two ways.
            OSError: it cannot be read.
        """
        known = files_by_id(self.annotations, (".xml",))
        if isinstance(self.split, str):
            ids: Iterable[str] = read_list(self.split, known, self.annotations)
        else:
            ids = sorted(known if self.split is None else self.split.of(known))
        return [key for key in ids if key not in self.left_out]

    def annotation(self, key: str) -> str:
        """The xml file of an image."""
        path = os.path.join(self.annotations, key)
        return f"{path}.xml" if os.path.isfile(f"{path}.xml") else f"{path}.XML"


def read_annotation(file: str) -> VocImage:
    """Read an xml file of Annotations/.

    Raises:
        ValueError: the file does not exist, is not xml, or lacks a size, a name or a number.
    """
    try:
        tree = _parse(file)
        width, height = (int(float(_text(tree, f"size/{side}"))) for side in ("width", "height"))
        if width < 1 or height < 1:
            raise ValueError(f"the image's size is {width} x {height}")
        found = [_read_object(element, width, height) for element in tree.findall("object")]
    except (OSError, ElementTree.ParseError, ValueError, OverflowError) as error:
        raise ValueError(f"cannot read the VOC annotation '{file}': {error}") from error
    objects = [item for item in found if item is not None]
    name = (tree.findtext("filename") or "").strip()
    return VocImage(width, height, objects, len(found) - len(objects), name)


def _parse(file: str) -> ElementTree.Element:
    with open(file, "rb") as stream:
        content = stream.read()
    try:
        return ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        # The parser knows few encodings, and some tools declare another one than they write.
        declaration = _DECLARATION.match(content)
        for encoding in (declaration[1].decode(), "utf-8") if declaration else ():
            try:
                return ElementTree.fromstring(content.decode(encoding).partition("?>")[2])
            except (ElementTree.ParseError, ValueError, LookupError):
                continue
        raise error if isinstance(error, ElementTree.ParseError) else ValueError(str(error)) from error


def _read_object(element: ElementTree.Element, width: int, height: int) -> VocObject | None:
    """The object; None if its box, clipped to the image, has no area."""
    x1, y1, x2, y2 = (float(_text(element, f"bndbox/{corner}")) for corner in _CORNERS)
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        raise ValueError(f"a box is {x1, y1, x2, y2}")
    if x2 <= max(x1, 0) or y2 <= max(y1, 0) or x1 > width or y1 > height:
        return None
    difficult = float(element.findtext("difficult") or 0) != 0
    return VocObject(_text(element, "name"), (x1, y1, x2, y2), difficult)


def _text(element: Any, path: str) -> str:
    text = (element.findtext(path) or "").strip()
    if not text:
        raise ValueError(f"it has no <{path.replace('/', '><')}>, or an empty one")
    return text


def load_voc(name: str, folder: VocFolder, classes: Sequence[str]) -> list[dict[str, Any]]:
    """detectron2's dicts of a dataset in VOC's form.

    Like detectron2's ``load_voc_instances``, but it also reads other layouts, splits of one image and other
    suffixes than .jpg, its errors name the file, and it drops boxes without area.

    Raises:
        ValueError: an annotation cannot be read, or has a class that is not in ``classes``; the
            split holds no box, or several images have one id.
    """
    ids = folder.ids()
    images = [read_annotation(folder.annotation(key)) for key in ids]
    if not any(image.objects for image in images):
        split = "" if folder.split is None else f", split '{folder.split}',"
        raise ValueError(
            f"dataset '{name}' has no annotations: '{folder.annotations}'{split} holds {len(ids)} images "
            "and no boxes"
        )
    _check_classes(name, ids, images, classes)
    without_area = sum(image.without_area for image in images)
    if without_area:
        text = f"Dataset '{name}': dropped {without_area} boxes without area"
        log_first_n(logging.WARNING, text, key="message")
    files = _ImageFiles(folder.images)
    return [
        {
            "file_name": os.path.join(folder.images, files.find(key, image.file_name)),
            "image_id": key,
            "height": image.height,
            "width": image.width,
            "annotations": [_instance(item, classes) for item in image.objects],
        }
        for key, image in zip(ids, images)
    ]


def check_evaluated_ids(name: str, ids: Iterable[Any]) -> None:
    """Check that the evaluator of a registered dataset finds the annotations of these images.

    Raises:
        ValueError: the split that it reads has other ids.
    """
    folder = VocFolder.of_dataset(name)
    listed, given = folder.ids(), {str(key) for key in ids}
    strange, left_out = sorted(given - set(listed)), sorted(set(listed) - given)
    if strange or left_out:
        raise ValueError(
            f"dataset '{name}': its records and the split that VOC's evaluation reads ('{folder.split}') differ: "
            f"image_ids that the split lacks: {strange[:3]} ({len(strange)} in all), ids without a record: "
            f"{left_out[:3]} ({len(left_out)} in all); an image_id is a line of the split"
        )


class _ImageFiles:
    """The images of a folder by their ids."""

    def __init__(self, folder: str):
        self.folder = folder
        # Empty without the folder, which is reported elsewhere.
        self.by_id = files_by_id(folder, IMAGE_SUFFIXES)

    def find(self, key: str, named: str) -> str:
        """The file of an image, relative to the folder.

        Args:
            key: its id.
            named: the name in its annotation, which decides if several files, or none, have this id.

        Raises:
            ValueError: several files have this id, and the annotation names none of them.
        """
        found = self.by_id.get(key, [])
        named = named.replace("\\", "/").rpartition("/")[2]
        if len(found) > 1:
            found = [file for file in found if os.path.basename(file) == named] or found
        if len(found) > 1:
            raise ValueError(
                f"'{self.folder}' holds several images '{key}', {found}, and the annotation's <filename> names "
                f"none of them ('{named}'); remove the others, or name one there"
            )
        if found:
            return found[0]
        beside = os.path.join(os.path.dirname(key), named)
        for file in (beside, named) if named else ():
            if os.path.isfile(os.path.join(self.folder, file)):
                return file
        return f"{key}.jpg"


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
        log_first_n(logging.WARNING, f"Dataset '{name}': no box of {absent}", key="message")


def _instance(item: VocObject, classes: Sequence[str]) -> dict[str, Any]:
    x1, y1, x2, y2 = item.corners
    # Pixels count from 1, and the last one belongs to the box.
    box = [x1 - 1.0, y1 - 1.0, x2, y2]
    label = list(classes).index(item.label)
    return {"category_id": label, "bbox": box, "bbox_mode": BoxMode.XYXY_ABS}
