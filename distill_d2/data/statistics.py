"""How often the classes of a training dataset occur, and how large their instances are.

Read from the dataset's own annotations, once: sums per class are kept in a small json file beside them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

logger = logging.getLogger(__name__)

_VERSION = 1  # count it up when the same annotations give other sums
_SUFFIX = ".box_statistics.json"
#: Of a table: what is summed over the instances of a class; sizes are fractions of the image's.
_COLUMNS = ("count", "width", "height", "width^2", "height^2")


@dataclass(frozen=True, eq=False)
class BoxStatistics:
    """Frequencies and sizes of the instances of each class.

    Attributes:
        counts: (classes,), int64: instances per class, by detectron2's contiguous class ids.
        mean: (classes, 2), float64: mean width and height, in units of image width and height.
        std: (classes, 2), float64: their standard deviations (population).
    """

    counts: np.ndarray
    mean: np.ndarray
    std: np.ndarray


def box_statistics(names: Sequence[str]) -> BoxStatistics:
    """Of the annotations of the registered datasets ``names`` together, one that is named twice
    counting twice.

    Crowds and boxes of no area are left out; boxes are clipped to their image. A class without
    instances has the mean and std of all instances together. There are as many classes as the
    dataset with the most has, by its metadata or its annotations.

    What each dataset adds is cached: beside its ``json_file``, else in its ``dirname`` (VOC layout),
    else not at all. It is used as long as the annotations do not change; the dataset is not loaded
    then, so what its loader does besides (set a ``thing_classes`` that comes from the json) is not done.

    Args:
        names: of datasets in ``DatasetCatalog``.

    Raises:
        KeyError: a name is not registered.
        ValueError: there are no instances, or annotations lack a size, a class or a box that
            detectron2 could use; the dataset is named.
    """
    tables = [_table(name) for name in names]
    total = np.zeros((max(map(len, tables), default=0), len(_COLUMNS)))
    for table in tables:
        total[: len(table)] += table
    if not total[:, 0].any():
        raise ValueError(
            f"the datasets {list(names)} hold no instances (crowds and boxes outside the image or of "
            "no area do not count); box statistics need at least one"
        )
    return _from_table(total)


def _from_table(table: np.ndarray) -> BoxStatistics:
    filled = np.where(table[:, :1] > 0, table, table.sum(axis=0))
    mean, square = np.split(filled[:, 1:] / filled[:, :1], 2, axis=1)
    # Rounding may leave less than nothing where all instances are alike.
    variance = np.maximum(square - mean**2, 0)
    return BoxStatistics(table[:, 0].astype(np.int64), mean, np.sqrt(variance))


def _table(name: str) -> np.ndarray:
    """(classes, 5), float64: see ``_COLUMNS``."""
    before = _find_cache(name)
    table = None if before is None else _read(before, _class_names(name))
    if table is not None:
        return table
    table = _measure(name, DatasetCatalog.get(name))
    # A loader may generate the annotations; changed ones may be others than those just loaded.
    after = _find_cache(name)
    if after is not None and before in (None, after):
        _write(after, _class_names(name), table)
    return table


# Annotations


def _measure(name: str, dicts: list[dict[str, Any]]) -> np.ndarray:
    classes = len(_class_names(name) or ())
    try:
        return _sum_up(dicts, classes)
    except (KeyError, TypeError, ValueError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"the annotations of dataset '{name}' cannot be used: {type(error).__name__}: {error}"
        ) from error


def _sum_up(dicts: list[dict[str, Any]], classes: int) -> np.ndarray:
    """The table of a dataset of at least so many classes."""
    images = [record for record in dicts if record.get("annotations")]
    parts = _gather(images)
    if not parts:
        return np.zeros((classes, len(_COLUMNS)))
    corners, labels, owners = (np.concatenate(part) for part in zip(*parts))
    whole = np.array([(record["width"], record["height"]) for record in images], np.float64)[owners]
    size = np.clip(corners[:, 2:], 0, whole) - np.clip(corners[:, :2], 0, whole)
    kept = (size > 0).all(axis=1)
    size, labels = size[kept] / whole[kept], labels[kept]
    columns = np.concatenate([np.ones((len(size), 1)), size, size**2], axis=1).T
    return np.stack([np.bincount(labels, column, classes) for column in columns], axis=1)


def _gather(images: list[dict[str, Any]]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Corners (n, 4), classes (n,) and indices of images (n,) of all but crowds, for each box mode."""
    by_mode: dict[int, list] = {}
    for index, record in enumerate(images):
        for item in record["annotations"]:
            if not item.get("iscrowd", 0):
                found = by_mode.setdefault(item["bbox_mode"], [])
                found.append((item["bbox"], item["category_id"], index))
    parts = []
    for mode, found in by_mode.items():
        boxes, labels, owners = zip(*found)
        corners = BoxMode.convert(np.array(boxes, np.float64), BoxMode(mode), BoxMode.XYXY_ABS)
        parts.append((corners, np.array(labels), np.array(owners)))
    return parts


def _class_names(name: str) -> list[str] | None:
    """None: not known, at least not before the dataset is loaded."""
    names = MetadataCatalog.get(name).get("thing_classes")
    return None if names is None else [str(item) for item in names]


# Cache


class _Cache(NamedTuple):
    """Its path, and what tells the annotations that it is of from others."""

    path: str
    fingerprint: dict[str, Any]


def _find_cache(name: str) -> _Cache | None:
    """None: the dataset has no file of annotations that is known and exists."""
    metadata = MetadataCatalog.get(name)
    json_file, folder, split = (metadata.get(key) for key in ("json_file", "dirname", "split"))
    try:
        if json_file:
            path = os.path.splitext(json_file)[0] + _SUFFIX
            files = {os.path.basename(json_file): _stamp(json_file)}
        elif folder and split:
            path = os.path.join(folder, re.sub(r"[^\w.-]", "_", name) + _SUFFIX)
            split_file = os.path.join(folder, "ImageSets", "Main", f"{split}.txt")
            xml = os.path.join(folder, "Annotations")
            files = {f"{split}.txt": _stamp(split_file), "Annotations": _stamp_folder(xml)}
        else:
            return None
    except OSError:  # not generated yet, or no local file
        return None
    return _Cache(path, {"version": _VERSION, "dataset": name, "files": files})


def _stamp(file: str) -> list[int]:
    status = os.stat(file)
    return [status.st_size, status.st_mtime_ns]


def _stamp_folder(folder: str) -> list[int]:
    """Also of the files in it: a folder's own time does not tell that one was edited."""
    with os.scandir(folder) as entries:
        files = [entry.stat() for entry in entries]
    size, time = sum(file.st_size for file in files), sum(file.st_mtime_ns for file in files)
    return [len(files), size, time, os.stat(folder).st_mtime_ns]


def _read(cache: _Cache, classes: list[str] | None) -> np.ndarray | None:
    """The table; None if there is none of these annotations and classes."""
    try:
        with open(cache.path, encoding="utf-8") as file:
            content = json.load(file)
        if content["fingerprint"] != cache.fingerprint:
            return None
        # VOC's class ids follow the config, which may list them in another order now.
        if classes is not None and content["classes"] != classes:
            return None
        table = np.array(content["rows"], np.float64)
        fits = table.shape == (max(len(table), len(classes or ())), len(_COLUMNS))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None
    return table if fits and _is_plausible(table) else None


def _is_plausible(table: np.ndarray) -> bool:
    """Sizes are fractions, so no sum can exceed the count; false for NaN."""
    count, size, square = table[:, :1], table[:, 1:3], table[:, 3:]
    in_order = (0 <= square) & (square <= size) & (size <= count)
    return bool(in_order.all() and (count == np.floor(count)).all())


def _write(cache: _Cache, classes: list[str] | None, table: np.ndarray) -> None:
    """It appears complete or not at all, whoever else writes it; that it cannot be is only logged."""
    content = {
        "fingerprint": cache.fingerprint,
        "classes": classes,
        "columns": _COLUMNS,
        "rows": table.tolist(),
    }
    # No mkstemp: its files could be read by their owner only.
    partial = f"{cache.path}.{uuid.uuid4().hex}"
    try:
        with open(partial, "x", encoding="utf-8") as file:
            file.write(json.dumps(content))
        os.replace(partial, cache.path)
    except OSError as error:
        logger.info(f"Cannot keep the box statistics of '{cache.fingerprint['dataset']}': {error}")
    finally:
        with contextlib.suppress(OSError):
            os.unlink(partial)
