"""Read annotations in YOLO's form: one text file per image, "class x y width height" or a polygon per line."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from detectron2.structures import BoxMode
from detectron2.utils.logger import log_first_n

from .images import IMAGE_SUFFIXES, image_sizes
from .lists import files_by_id, read_list
from .split import Share
from .text import read_lines, read_text

#: Files that name classes.
NAMES_FILES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml", "classes.txt", "obj.names")
_LEVELS = 3  # folders above the images in which the classes are looked for
_BEYOND = 0.01  # by which rounding may exceed the image


@dataclass(frozen=True)
class YoloFolder:
    """Where the files of a dataset are.

    Attributes:
        images: a folder of images, of any depth.
        labels: a folder of text files with the same names.
        split: a file that lists images, a share of all, or None: all.
    """

    images: str
    labels: str
    split: str | Share | None = None


def labels_of(images: str) -> str:
    """By YOLO's convention, the folder of labels: .../labels/train for .../images/train; if there is none, the
    labels are beside the images."""
    parts = os.path.normpath(images).split(os.sep)
    for index in reversed([index for index, part in enumerate(parts) if part == "images"]):
        folder = os.sep.join([*parts[:index], "labels", *parts[index + 1 :]])
        if os.path.isdir(folder):
            return folder
    return images


def find_classes(name: str, folder: YoloFolder) -> list[str]:
    """The names of the classes from a data.yaml, classes.txt or obj.names beside or above labels and images.

    Raises:
        ValueError: there is none, or it holds no names.
    """
    found = find_names(folder)
    if found is None:
        raise ValueError(
            f"DATASETS.CUSTOM: dataset '{name}' does not name its classes; add CLASSES: [...], or one of "
            f"{list(NAMES_FILES)} beside or above '{folder.images}'"
        )
    return read_classes(found)


def find_names(folder: YoloFolder) -> str | None:
    """The file that names the classes, one of NAMES_FILES beside or above labels and images, or None."""
    places = [folder.labels, folder.images]
    for _ in range(_LEVELS):
        places.append(os.path.dirname(os.path.normpath(places[-1])))
    files = (os.path.join(place, file) for place in places for file in NAMES_FILES)
    return next(filter(os.path.isfile, files), None)


def read_classes(file: str) -> list[str]:
    """The names in a yaml file (names: [a, b] or {0: a, 1: b}) or a list of one per line.

    Raises:
        ValueError: there are none.
        OSError: the file cannot be read.
    """
    if not file.endswith((".yaml", ".yml")):
        names: Any = read_lines(file)
    else:
        try:
            content = yaml.load(
                read_text(file), yaml.BaseLoader
            )  # text: a class may be called no, or 007
        except yaml.YAMLError as error:
            raise ValueError(f"'{file}' is not yaml: {error}") from error
        names = content.get("names") if isinstance(content, dict) else None
        if isinstance(names, dict) and sorted(map(str, names)) == sorted(map(str, range(len(names)))):
            names = [names[key] for key in sorted(names, key=int)]
    if not isinstance(names, list) or not names or len(set(map(str, names))) < len(names):
        raise ValueError(
            f"'{file}' holds the names {names!r}; expected a list of different names of classes"
        )
    return list(map(str, names))


def load_yolo(name: str, folder: YoloFolder, classes: Sequence[str]) -> list[dict[str, Any]]:
    """detectron2's dicts of a dataset in YOLO's form. Rows of more than five numbers are polygons; boxes and
    polygons are clipped to their image. An image without a text file has no objects.

    Raises:
        ValueError: there are no images or no text files, an image cannot be read, two images have one name, or a
            row is wrong: the message names file and line.
        OSError: the list of the split cannot be read.
    """
    files = files_by_id(folder.images, IMAGE_SUFFIXES)
    if isinstance(folder.split, str):
        ids = read_list(folder.split, files, folder.images)
    else:
        ids = sorted(files if folder.split is None else folder.split.of(files))
    twice = [files[key] for key in ids if len(files[key]) > 1]
    if twice:
        raise ValueError(
            f"dataset '{name}': '{folder.images}' holds {len(twice)} names with several images, the first is "
            f"{twice[0]}; they would share their labels: remove the others"
        )
    if not ids:
        raise ValueError(f"dataset '{name}': '{folder.images}' holds no images of this split")
    paths = [os.path.join(folder.images, files[key][0]) for key in ids]
    rows = [_read_rows(os.path.join(folder.labels, f"{key}.txt"), classes) for key in ids]
    without = sum(found is None for found in rows)
    if without == len(ids):
        raise ValueError(
            f"dataset '{name}' has no annotations: there is no text file of {len(ids)} images, such as "
            f"'{os.path.join(folder.labels, ids[0])}.txt'; LABELS names their folder"
        )
    if without:
        text = f"Dataset '{name}': {without} of {len(ids)} images have no text file, thus no objects"
        log_first_n(logging.WARNING, text, key="message")
    sizes = image_sizes(paths)
    records = [
        {
            "file_name": path,
            "image_id": key,
            "height": height,
            "width": width,
            "annotations": [_instance(row, width, height) for row in found or ()],
        }
        for key, path, (height, width), found in zip(ids, paths, sizes, rows)
    ]
    _drop_without_area(name, records)
    return records


def _read_rows(file: str, classes: Sequence[str]) -> list[list[float]] | None:
    """The rows of a text file; None if there is no file."""
    try:
        lines = read_text(file).splitlines()
    except FileNotFoundError:
        return None
    rows = []
    for number, line in enumerate(lines, 1):
        row = line.split()
        if not row:
            continue
        try:
            values = list(map(float, row))
        except ValueError:
            values = []
        problem = _problem(values, classes)
        if problem:
            raise ValueError(f"'{file}', line {number}, is '{line.strip()[:80]}': {problem}")
        rows.append(values)
    return rows


def _problem(row: list[float], classes: Sequence[str]) -> str:
    """What is wrong with a row; "" if nothing."""
    if not row or not all(map(math.isfinite, row)):
        return "expected numbers, separated by spaces"
    if len(row) != 5 and (len(row) < 7 or len(row) % 2 == 0):
        return (
            f"{len(row)} numbers; expected class x y width height, or class and the x y of at least 3 points "
            "(neither confidences nor keypoints)"
        )
    if not row[0].is_integer() or not 0 <= row[0] < len(classes):
        return (
            f"class {row[0]:g}; expected 0 to {len(classes) - 1}, for the classes {list(classes)[:10]}"
        )
    if min(row[1:]) < -_BEYOND or max(row[1:]) > 1 + _BEYOND:
        return "expected fractions of the image's width and height, 0 to 1, not pixels"
    return ""


def _instance(row: list[float], width: int, height: int) -> dict[str, Any]:
    if len(row) == 5:
        x, y, w, h = row[1:]
        points = [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
    else:
        points = row[1:]
    xs = [min(max(x, 0.0), 1.0) * width for x in points[::2]]
    ys = [min(max(y, 0.0), 1.0) * height for y in points[1::2]]
    found: dict[str, Any] = {"bbox": [min(xs), min(ys), max(xs), max(ys)], "bbox_mode": BoxMode.XYXY_ABS}
    found["category_id"] = int(row[0])
    if len(row) > 5:
        found["segmentation"] = [[number for point in zip(xs, ys) for number in point]]
    return found


def _drop_without_area(name: str, records: list[dict[str, Any]]) -> None:
    count = 0
    for record in records:
        items = record["annotations"]
        kept = [i for i in items if i["bbox"][2] > i["bbox"][0] and i["bbox"][3] > i["bbox"][1]]
        record["annotations"], count = kept, count + len(items) - len(kept)
    if count:
        text = f"Dataset '{name}': dropped {count} boxes without area"
        log_first_n(logging.WARNING, text, key="message")
