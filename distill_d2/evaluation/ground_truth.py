"""The ground truth that COCO's evaluation reads: the one that training sees."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict

from ..data.coco import coco_source, is_right, read_coco


def with_ground_truth(name: str, folder: str) -> str:
    """The name of metadata from which detectron2's COCOEvaluator evaluates a dataset: the dataset's own where
    its json needs no mending. Otherwise what training reads is written to ``folder``/ground_truth.json.

    detectron2 itself would write the annotations of a dataset without a json once, and use that file in
    later runs whatever the annotations are by then.

    Args:
        name: of the dataset, whose annotations have been loaded.
        folder: for the file.

    Raises:
        ValueError: the json cannot be read or mended.
    """
    source = coco_source(name)
    if source is None:
        return _described(name, folder, convert_to_coco_dict(name))
    if is_right(source):
        return name
    found = read_coco(source)
    if not found.changes and not source.corners and source.share is None:
        return name
    return _described(name, folder, found.content)


def _described(name: str, folder: str, content: dict[str, Any]) -> str:
    """Write the json, and metadata that name it."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "ground_truth.json")
    partial = f"{path}.{os.getpid()}"  # each process writes the same
    with open(partial, "w") as file:
        json.dump(content, file, default=_plain)
    os.replace(partial, path)
    described = f"{name} in {path}"
    if described in MetadataCatalog.list():
        MetadataCatalog.remove(described)  # set values are constant
    values = {key: value for key, value in MetadataCatalog.get(name).as_dict().items() if key != "name"}
    MetadataCatalog.get(described).set(**{**values, "json_file": path})
    return described


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy, and compressed masks, as json's types."""
    if isinstance(value, bytes):
        return value.decode("ascii")
    return np.asarray(value).tolist()


def load_annotations(name: str) -> None:
    """Load a dataset whose metadata say nothing of its classes yet, or whose json is made on first use."""
    metadata = MetadataCatalog.get(name)
    json_file = os.fspath(metadata.get("json_file") or "")
    missing = json_file and "://" not in json_file and not os.path.exists(json_file)
    if missing or metadata.get("thing_classes") is None:
        DatasetCatalog.get(name)
