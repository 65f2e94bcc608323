"""Find what is wrong with the records of a dataset (detectron2's dicts), whatever code made them."""

from __future__ import annotations

import collections
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from .annotations import Annotations, describe_record

logger = logging.getLogger(__name__)

_LARGEST_SIDE = 1e6  # pixels


def check_records(
    name: str,
    dicts: Sequence[dict[str, Any]],
    num_classes: int | None = None,
    tested: bool = False,
    need_files: bool = True,
) -> None:
    """Check all records of a dataset; boxes outside their image or without area are counted in the log.

    Args:
        name: of the dataset.
        dicts: its records.
        num_classes: of the dataset, or else of the model; None: not known.
        tested: whether an evaluator reads them, which needs ids of images.
        need_files: whether the mapper reads images from files.

    Raises:
        ValueError: a record or annotation lacks something, or holds what detectron2 cannot use: the message
            says how many do, and names the first.
    """
    _check_keys(name, dicts, tested, need_files)
    _note_files_named_twice(name, dicts)
    _check_sizes(name, dicts)
    if tested:
        _check_ids(name, dicts)
    counts = [len(record.get("annotations") or ()) for record in dicts]
    if any(counts):
        Annotations(name, dicts, counts).check(num_classes)


def _check_keys(name: str, dicts: Sequence[dict[str, Any]], tested: bool, need_files: bool) -> None:
    wanted = ["file_name"] * need_files + ["image_id"] * tested
    wanted += ["annotations"] * any("annotations" in record for record in dicts)
    wanted += ["height", "width"]
    advice = {
        "file_name": "detectron2 reads images from files; write arrays to files, or choose a mapper of your "
        "own by INPUT.MAPPER",
        "image_id": "the evaluator finds the annotations of an image by its id",
        "annotations": "an image without objects has an empty list",
    }
    for key in wanted:
        lacking = [index for index, record in enumerate(dicts) if record.get(key) is None]
        if lacking:
            raise ValueError(
                f"dataset '{name}': {len(lacking)} of {len(dicts)} records have no '{key}', the first is "
                f"{describe_record(dicts[lacking[0]], lacking[0])}, with {sorted(map(str, dicts[lacking[0]]))}; "
                + advice.get(key, f"add the {key} of the image in pixels")
            )
    for index, record in enumerate(dicts if need_files else ()):
        if not isinstance(record["file_name"], (str, os.PathLike)):
            raise ValueError(
                f"dataset '{name}': file_name is {record['file_name']!r} in record {index}; expected a path"
            )


def _note_files_named_twice(name: str, dicts: Sequence[dict[str, Any]]) -> None:
    files = collections.Counter(
        os.fspath(r["file_name"]) for r in dicts if r.get("file_name") is not None
    )
    twice = [file for file, count in files.items() if count > 1]
    if twice:
        logger.warning(
            f"Dataset '{name}': {len(twice)} images are named by several records, the first is '{twice[0]}'; if "
            "each record has some of its objects, the others count as background"
        )


def _check_sizes(name: str, dicts: Sequence[dict[str, Any]]) -> None:
    for index, record in enumerate(dicts):
        for key in ("height", "width"):
            size = record[key]
            if (
                not isinstance(size, (int, float, np.number))
                or not 0 < size < _LARGEST_SIDE
                or size != int(size)
            ):
                raise ValueError(
                    f"dataset '{name}': {key} is {size!r} ({type(size).__name__}) in "
                    f"{describe_record(record, index)}; expected a whole number of pixels"
                )


def _check_ids(name: str, dicts: Sequence[dict[str, Any]]) -> None:
    """Ids are those of evaluation: a repeated one would give an image the boxes of another."""
    ids = [record["image_id"] for record in dicts]
    strange = [value for value in ids if not isinstance(value, (int, str))]
    if strange:
        raise ValueError(
            f"dataset '{name}': {len(strange)} image ids are not int or str, the first is {strange[0]!r}; convert "
            "them, since evaluators write them to json files"
        )
    if len(set(ids)) == len(ids):
        return
    twice, count = collections.Counter(ids).most_common(1)[0]
    files = [os.fspath(r["file_name"]) for r in dicts if r["image_id"] == twice and "file_name" in r]
    raise ValueError(
        f"dataset '{name}': {len(ids) - len(set(ids))} image ids are repeated; {count} images have the id "
        f"{twice!r}: {files[:3]}. An evaluator needs a different one for each image"
    )
