"""The ground truth of images, where there is one."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from ..data import (
    adopt_coco_datasets,
    register_builtin_voc,
    register_custom_datasets,
    register_shapes,
)
from .trained import Trained


class Truth:
    """Annotations of images.

    Attributes:
        records: detectron2's dicts.
        classes: their names, by number.
        category_ids: those of the json, by the names of classes; {}: it has none.
    """

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        classes: Sequence[str],
        category_ids: dict[str, int],
    ):
        self.records = list(records)
        self.classes = list(classes)
        self.category_ids = category_ids
        self._by_path = {os.path.realpath(record["file_name"]): record for record in records}
        self._by_name = defaultdict(list)
        for path, record in self._by_path.items():
            self._by_name[os.path.basename(path)].append(record)

    @property
    def paths(self) -> list[str]:
        """Of the images, in the order of the data; they may not exist."""
        return list(self._by_path)

    def of(self, path: str) -> dict[str, Any] | None:
        """The record of an image, that of the same file. A json may lie far from its images: a record whose file
        does not exist is that of the image of the same name, if there is only one. None: there is none."""
        named = self._by_name[os.path.basename(path)]
        lost = len(named) == 1 and not os.path.exists(named[0]["file_name"])
        return self._by_path.get(os.path.realpath(path), named[0] if lost else None)


def read_truth(json_file: str) -> Truth:
    """The annotations of a COCO json.

    Raises:
        FileNotFoundError, ValueError: it does not exist or is no such json; the message names it.
    """
    path = os.path.abspath(os.path.expanduser(json_file))
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"--truth '{json_file}' does not exist; expected annotations as COCO json"
        )
    name = f"truth {path[1:]}"
    register_custom_datasets(
        [{"NAME": name, "FORMAT": "coco", "JSON": path, "IMAGES": os.path.dirname(path)}]
    )
    return _of_datasets([name])


def truth_of_tests(trained: Trained) -> Truth | None:
    """The annotations of a run's DATASETS.TEST; None where its data are not here."""
    config = trained.cfg
    if not isinstance(config, CfgNode):
        return None
    register_shapes()
    register_builtin_voc()
    names = list(config.DATASETS.TEST)
    try:
        entries = [entry for entry in config.DATASETS.CUSTOM if isinstance(entry, dict)]
        register_custom_datasets([entry for entry in entries if entry.get("NAME") in names])
        adopt_coco_datasets(names)
        there = all(map(_is_there, names))
        return _of_datasets(names) if names and there else None
    except (OSError, ValueError, KeyError):
        return None


def _is_there(name: str) -> bool:
    """False where annotations are missing that would be generated, or downloaded, when they are loaded."""
    json_file = MetadataCatalog.get(name).get("json_file") or ""
    return not json_file or os.path.isfile(json_file)


def _of_datasets(names: Sequence[str]) -> Truth:
    records = [record for name in names for record in DatasetCatalog.get(name)]
    metadata = MetadataCatalog.get(names[0])
    classes = list(metadata.get("thing_classes", ()))
    numbers = metadata.get("thing_dataset_id_to_contiguous_id", {})
    return Truth(records, classes, {classes[number]: key for key, number in numbers.items()})
