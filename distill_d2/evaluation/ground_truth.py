"""The ground truth that COCO's evaluation reads: the one that training sees."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.structures import BoxMode

from ..data.coco import coco_source
from ..data.coco_masks import area
from ..data.coco_reading import is_right, read_coco
from ..data.sample import has

#: Of ``of_records``; None: all.
_RECORDS: Sequence[dict[str, Any]] | None = None


@contextlib.contextmanager
def of_records(records: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Inside, ``with_ground_truth`` gives that of these records of a dataset alone."""
    global _RECORDS
    _RECORDS = records
    try:
        yield
    finally:
        _RECORDS = None


def with_ground_truth(name: str, folder: str) -> str:
    """The name of metadata from which detectron2's COCOEvaluator evaluates a dataset: the dataset's own where
    its json needs no correction. Otherwise what training reads is written to ``folder``/ground_truth.json.

    detectron2 itself would write the annotations of a dataset without a json once, and use that file in
    later runs whatever the annotations are by then.

    Args:
        name: of the dataset, whose annotations have been loaded.
        folder: for the file.

    Raises:
        ValueError: the json cannot be read or corrected.
    """
    source = coco_source(name)
    if source is None:
        return _described(name, folder, _content(name))
    own = os.fspath(MetadataCatalog.get(name).json_file) == source.json_file
    if _RECORDS is not None and own:
        return _described(name, folder, _part(read_coco(source).content, _RECORDS))
    if MetadataCatalog.get(name).get("left_out"):
        return _described(name, folder, _part(read_coco(source).content, DatasetCatalog.get(name)))
    if is_right(source):
        return name
    found = read_coco(source)
    if not found.changes and not source.corners and source.share is None:
        return name
    return _described(name, folder, found.content)


def _part(content: dict[str, Any], records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The images of these records, and their annotations; all, if there are not all of these images."""
    ids = {record["image_id"] for record in records}
    if not ids <= {image["id"] for image in content["images"]}:
        return content
    part = {**content, "images": [image for image in content["images"] if image["id"] in ids]}
    if "annotations" in content:
        part["annotations"] = [item for item in content["annotations"] if item["image_id"] in ids]
    return part


def _described(name: str, folder: str, content: dict[str, Any]) -> str:
    """Write the json, and metadata that name it."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, "ground_truth.json")
    partial = f"{path}.{os.getpid()}"  # each process writes the same
    with open(partial, "w") as file:
        file.write(json.dumps(content, default=_plain))  # in one piece, which is four times faster
    os.replace(partial, path)
    described = f"{name} in {path}"
    if described in MetadataCatalog.list():
        MetadataCatalog.remove(described)  # set values are constant
    values = {key: value for key, value in MetadataCatalog.get(name).as_dict().items() if key != "name"}
    MetadataCatalog.get(described).set(**{**values, "json_file": path})
    return described


def _content(name: str) -> dict[str, Any]:
    """The records of a dataset as COCO's content, as detectron2's ``convert_to_coco_dict`` makes it, one by one
    (7 s for 10,000 images)."""
    records = DatasetCatalog.get(name) if _RECORDS is None else _RECORDS
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is None:
        raise ValueError(
            f"dataset '{name}' has evaluator_type 'coco', but its metadata has neither a json_file nor "
            "thing_classes; set thing_classes to the names of its classes"
        )
    annotations: list[dict[str, Any]] = []
    for record in records:
        for item in record.get("annotations", ()):
            if item["bbox_mode"] == BoxMode.XYWHA_ABS:
                return convert_to_coco_dict(name)
            annotations.append(_annotation(item, record["image_id"], len(annotations) + 1))
    ids = {index: key for key, index in metadata.get("thing_dataset_id_to_contiguous_id", {}).items()}
    for item in annotations:
        item["category_id"] = ids.get(item["category_id"], item["category_id"])
    images = [
        {
            "id": record["image_id"],
            "width": record["width"],
            "height": record["height"],
            "file_name": os.fspath(record.get("file_name", "")),
        }
        for record in records
    ]
    classes = enumerate(metadata.thing_classes)
    categories = [{"id": ids.get(index, index), "name": label} for index, label in classes]
    content = {"info": {}, "images": images, "categories": categories}
    return {**content, "annotations": annotations} if annotations else content


def _annotation(item: dict[str, Any], image_id: int | str, number: int) -> dict[str, Any]:
    x, y, w, h = map(float, item["bbox"])
    if item["bbox_mode"] == BoxMode.XYXY_ABS:
        w, h = w - x, h - y
    found: dict[str, Any] = {"id": number, "image_id": image_id, "category_id": int(item["category_id"])}
    found.update(bbox=[x, y, w, h], iscrowd=int(item.get("iscrowd", 0)))
    if has(item, "segmentation"):
        found["segmentation"] = item["segmentation"]
    found["area"] = area(found)
    if has(item, "keypoints"):
        # COCO's keypoints are indices of pixels, detectron2's coordinates: a pixel's center is at 0.5.
        points = [number - 0.5 * (i % 3 != 2) for i, number in enumerate(item["keypoints"])]
        found.update(keypoints=points, num_keypoints=sum(visible > 0 for visible in points[2::3]))
    return found


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
