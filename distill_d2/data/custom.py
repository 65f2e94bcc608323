"""Datasets named in a config (DATASETS.CUSTOM), without code: VOC folders and COCO json files."""

from __future__ import annotations

import logging
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any, Dict, List, Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode

logger = logging.getLogger(__name__)

_KEYS = {
    "voc": {"NAME", "FORMAT", "ROOT", "SPLIT", "CLASSES", "YEAR"},
    "coco": {"NAME", "FORMAT", "JSON", "IMAGES", "CLASSES"},
}
_OPTIONAL = {"voc": {"YEAR"}, "coco": {"CLASSES"}}
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".JPG", ".JPEG", ".PNG")


def datasets_root() -> str:
    """$DETECTRON2_DATASETS, by default ./datasets."""
    return os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))


def register_custom_datasets(entries: Sequence[Dict[str, Any]]) -> None:
    """Register the datasets of DATASETS.CUSTOM; twice the same is once.

    Args:
        entries: dicts {NAME, FORMAT: "voc", ROOT, SPLIT, CLASSES, YEAR (2007: 11-point AP, or 2012:
            area AP)} or {NAME, FORMAT: "coco", JSON, IMAGES[, CLASSES]}. Relative paths are below
            $DETECTRON2_DATASETS.

    Raises:
        ValueError: an entry has missing or unknown keys, or a name that is already taken.
        FileNotFoundError: a folder or file does not exist; the message says what was found.
    """
    for entry in entries:
        entry = dict(entry)
        _check_keys(entry)
        name = entry["NAME"]
        if name in DatasetCatalog.list():
            if MetadataCatalog.get(name).get("custom_entry") == entry:
                continue
            raise ValueError(f"DATASETS.CUSTOM: a dataset '{name}' exists already; choose another NAME")
        (_register_voc if entry["FORMAT"] == "voc" else _register_coco)(name, entry)
        MetadataCatalog.get(name).custom_entry = entry


def _check_keys(entry: Dict[str, Any]) -> None:
    known = _KEYS.get(entry.get("FORMAT"))
    if known is None:
        raise ValueError(
            f"DATASETS.CUSTOM: FORMAT is {entry.get('FORMAT')!r} in {entry}; expected one of "
            f"{sorted(_KEYS)}"
        )
    unknown = set(entry) - known
    missing = known - _OPTIONAL[entry["FORMAT"]] - set(entry)
    if unknown or missing:
        raise ValueError(
            f"DATASETS.CUSTOM: unknown keys {sorted(unknown)}, missing keys {sorted(missing)} in "
            f"{entry}; a {entry['FORMAT']} dataset has {sorted(known)}"
        )


def _below_root(path: str) -> str:
    return os.path.join(datasets_root(), os.path.expanduser(path))


def _require(path: str, name: str) -> str:
    if os.path.exists(path):
        return path
    folder = os.path.dirname(path)
    while folder and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    found = sorted(os.listdir(folder or "."))[:20]
    raise FileNotFoundError(
        f"DATASETS.CUSTOM: dataset '{name}' needs '{path}', which does not exist; "
        f"'{folder or '.'}' holds {found}. Relative paths are below $DETECTRON2_DATASETS "
        f"({datasets_root()})"
    )


# VOC


def _register_voc(name: str, entry: Dict[str, Any]) -> None:
    root, split, classes = _below_root(entry["ROOT"]), entry["SPLIT"], list(entry["CLASSES"])
    year = entry.get("YEAR", 2007)
    if year not in (2007, 2012):
        raise ValueError(
            f"DATASETS.CUSTOM: YEAR of '{name}' is {year}; expected 2007 (11-point AP) or 2012 (area AP)"
        )
    _require(os.path.join(root, "ImageSets", "Main", f"{split}.txt"), name)
    _require(os.path.join(root, "Annotations"), name)
    _require(os.path.join(root, "JPEGImages"), name)
    DatasetCatalog.register(name, lambda: load_voc(name, root, split, classes))
    MetadataCatalog.get(name).set(
        thing_classes=classes,
        dirname=root,
        year=year,
        split=split,
        evaluator_type="pascal_voc",
    )


def load_voc(name: str, root: str, split: str, classes: Sequence[str]) -> List[Dict[str, Any]]:
    """detectron2's dicts of a VOC folder: Annotations/, ImageSets/Main/<split>.txt, JPEGImages/.

    Beyond detectron2's ``load_voc_instances``: images of any usual suffix; boxes without area are
    dropped and counted; errors name the file.

    Raises:
        ValueError: an annotation cannot be read, has a class that is not in ``classes``, or the
            split holds no box.
    """
    ids = (Path(root) / "ImageSets" / "Main" / f"{split}.txt").read_text().split("\n")
    ids = [line.split()[0] for line in ids if line.strip()]
    images = {Path(file).stem: file for file in os.listdir(os.path.join(root, "JPEGImages"))}
    dropped, dicts = 0, []
    for image_id in ids:
        xml = os.path.join(root, "Annotations", f"{image_id}.xml")
        record, degenerate = _voc_record(xml, image_id, classes)
        file = images.get(image_id, f"{image_id}.jpg")
        record["file_name"] = os.path.join(root, "JPEGImages", file)
        dropped += degenerate
        dicts.append(record)
    if not any(record["annotations"] for record in dicts):
        raise ValueError(f"dataset '{name}' ({root}, split {split}) has {len(ids)} images and no boxes")
    if dropped:
        logger.warning(f"Dataset '{name}': dropped {dropped} boxes without area")
    return dicts


def _voc_record(xml: str, image_id: str, classes: Sequence[str]):
    try:
        tree = ElementTree.parse(xml)
        size = tree.find("size")
        record = {
            "image_id": image_id,
            "height": int(size.find("height").text),
            "width": int(size.find("width").text),
        }
        boxes = [(obj.find("name").text, _voc_box(obj)) for obj in tree.findall("object")]
    except (OSError, ElementTree.ParseError, AttributeError, ValueError) as error:
        raise ValueError(f"cannot read the VOC annotation '{xml}': {error}") from error
    unknown = sorted({label for label, _ in boxes} - set(classes))
    if unknown:
        raise ValueError(
            f"'{xml}' holds classes {unknown} that are not among its dataset's CLASSES {list(classes)}"
        )
    record["annotations"] = [
        {"category_id": classes.index(label), "bbox": box, "bbox_mode": BoxMode.XYXY_ABS}
        for label, box in boxes
        if box[2] > box[0] and box[3] > box[1]
    ]
    return record, len(boxes) - len(record["annotations"])


def _voc_box(obj: ElementTree.Element) -> List[float]:
    # Pixel corners count from 1 and are inclusive, as detectron2 reads them.
    box = obj.find("bndbox")
    x1, y1, x2, y2 = (float(box.find(key).text) for key in ("xmin", "ymin", "xmax", "ymax"))
    return [x1 - 1.0, y1 - 1.0, x2, y2]


# COCO


def _register_coco(name: str, entry: Dict[str, Any]) -> None:
    json_file = _require(_below_root(entry["JSON"]), name)
    images = _require(_below_root(entry["IMAGES"]), name)
    classes = entry.get("CLASSES")
    DatasetCatalog.register(name, lambda: load_coco(name, json_file, images, classes))
    MetadataCatalog.get(name).set(json_file=json_file, image_root=images, evaluator_type="coco")


def load_coco(name: str, json_file: str, images: str, classes=None) -> List[Dict[str, Any]]:
    """detectron2's dicts of a COCO json; sets the dataset's ``thing_classes`` as a side effect.

    Raises:
        ValueError: it cannot be read, holds no annotation, or other classes than ``classes``.
    """
    try:
        dicts = load_coco_json(json_file, images, name)
    except (KeyError, TypeError, AssertionError, ValueError, IndexError) as error:
        raise ValueError(
            f"cannot read '{json_file}' of dataset '{name}' as COCO annotations: "
            f"{type(error).__name__}: {error}"
        ) from error
    found = list(MetadataCatalog.get(name).thing_classes)
    if classes is not None and list(classes) != found:
        raise ValueError(
            f"dataset '{name}': CLASSES is {list(classes)}, but '{json_file}' has {found}, in that order"
        )
    if not any(record["annotations"] for record in dicts):
        raise ValueError(f"dataset '{name}': '{json_file}' has {len(dicts)} images and no annotations")
    return dicts
