"""Predictions of one or several trained detectors on files of images: pictures, and a json of detections."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances

from ..checkpoint import write_whole
from ..evaluation.as_detections import as_detections
from ..mistakes import UnreadableRecord
from ..visualize.picture import Panel
from .images import read_bgr
from .pictures import panel, side_by_side
from .trained import Trained
from .truth import Truth

DETECTIONS = "detections.json"


@dataclass
class Predictions:
    """What was written.

    Attributes:
        pictures: their paths, by those of the images.
        detections: in the form of COCO's results, with the names of files, classes and (of several) runs.
        unreadable: what is wrong with the images that were skipped.
    """

    pictures: dict[str, str] = field(default_factory=dict)
    detections: list[dict[str, Any]] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def predict(
    runs: Mapping[str, Trained],
    images: Sequence[str],
    output: str,
    *,
    threshold: float = 0.5,
    truth: Truth | None = None,
) -> Predictions:
    """Write a picture of each image, with the ground truth and the detections of all runs side by side, and one
    json of all detections. Each is told, and so is an image that cannot be read and is skipped.

    Args:
        runs: by their titles.
        images: paths.
        output: the folder.
        threshold: the lowest score that counts.

    Raises:
        OSError: the folder cannot be written.
    """
    written = Predictions()
    for path, name in _picture_names(images).items():
        try:
            image = read_bgr(path)
            found = {title: _above(run.predict([image])[0], threshold) for title, run in runs.items()}
        except UnreadableRecord as error:
            problem = str(error) if path in str(error) else f"'{path}': {error}"
            written.unreadable.append(problem)
            print(f"skipped: {problem}", file=sys.stderr)
            continue
        record = truth.of(path) if truth else None
        for title, instances in found.items():
            results = _results(instances, runs[title].classes, path, record, truth)
            written.detections += (
                [{**each, "run": title} for each in results] if len(runs) > 1 else results
            )
        panels = [_truth_panel(image, found, record, truth)] if truth and record else []
        panels += [
            panel(title, image, found[title], run.classes, _keypoints(run))
            for title, run in runs.items()
        ]
        written.pictures[path] = _save(panels, path, image, os.path.join(output, name))
        print(f"{written.pictures[path]}: {', '.join(each.title for each in panels)}", flush=True)
    text = json.dumps(written.detections)
    write_whole(os.path.join(output, DETECTIONS), lambda file: file.write(text.encode()))
    return written


def _above(found: Instances, threshold: float) -> Instances:
    return found[found.scores >= threshold]


def _results(
    found: Instances,
    classes: Sequence[str],
    path: str,
    record: dict[str, Any] | None,
    truth: Truth | None,
) -> list[dict[str, Any]]:
    """COCO's results. Ids are those of the truth, where it has the image and the class; else the path and the
    class's number."""
    found = Instances(found.image_size, **found.get_fields())
    if found.has("pred_keypoints"):
        found.pred_keypoints = found.pred_keypoints.clone()  # detectron2 moves them in place
    results = instances_to_coco_json(found, record["image_id"] if record else path)
    ids = truth.category_ids if truth else {}
    for item in results:
        number = item["category_id"]
        name = classes[number] if number < len(classes) else str(number)
        item.update(category_id=ids.get(name, number), category_name=name, file_name=path)
    return results


def _truth_panel(
    image: np.ndarray, found: Mapping[str, Instances], record: dict[str, Any], truth: Truth
) -> Panel:
    """With masks and keypoints where a detector finds them."""
    masks, keypoints = (
        any(each.has(f"pred_{kind}") for each in found.values()) for kind in ("masks", "keypoints")
    )
    objects = as_detections(
        {**record, "height": image.shape[0], "width": image.shape[1]}, masks, keypoints
    )
    objects.remove("scores")
    return panel("ground truth", image, objects, truth.classes)


def _keypoints(run: Trained) -> Metadata | None:
    """Names of keypoints, where the training data are registered and have them."""
    names = run.cfg.DATASETS.TRAIN if isinstance(run.cfg, CfgNode) else ()
    known = [name for name in names if MetadataCatalog.get(name).get("keypoint_names")]
    return MetadataCatalog.get(known[0]) if known else None


def _save(panels: Sequence[Panel], path: str, image: np.ndarray, picture: str) -> str:
    height, width = image.shape[:2]
    figure = side_by_side(panels, [f"{path}, {width} x {height}"])
    write_whole(picture, lambda file: figure.savefig(file, format="png"))
    return picture


def _picture_names(images: Sequence[str]) -> dict[str, str]:
    """A different file name for each image."""
    names: dict[str, str] = {}
    counts: dict[str, int] = {}
    for path in images:
        stem = os.path.splitext(os.path.basename(path))[0]
        counts[stem] = counts.get(stem, 0) + 1
        names[path] = f"{stem}{f'_{counts[stem]}' if counts[stem] > 1 else ''}_detections.png"
    return names
