"""The detections that runs have stored, scored on resampled test images."""

from __future__ import annotations

import contextlib
import functools
import glob
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from tqdm import tqdm

from .bootstrap import Metric, image_weights, matches_of
from .runs import Run

_RESULTS, _TRUTH = "coco_instances_results.json", "ground_truth.json"
_WITHOUT = "--bootstrap 0 leaves out the interval over test images"
# Between an evaluation and its detections, in AP: other implementations of COCO's evaluation round differently.
_EQUAL = 0.01


def resampled(
    runs: Sequence[Run], task: str, name: str, *, draws: int, seed: int = 0, truth: str = ""
) -> list[np.ndarray]:
    """A metric of each run on test images drawn with replacement, from its stored detections.

    Args:
        task, name: of the metric, as in the results: "bbox" or "voc_2007_test/bbox", and "AP".
        truth: a COCO json with the ground truth; "": the one of the runs' evaluations.

    Returns:
        (draws,) each, float64, in percent, on the same images; nan where none of them has an object.

    Raises:
        OSError: detections or ground truth are not there.
        ValueError: the runs were tested on different data; detections are not those of the last evaluation; the
            metric is none of COCO's average precisions.
    """
    dataset, _, iou_type = task.rpartition("/")
    metric = Metric.named(iou_type, name)
    found = [(run, dataset or _dataset_of(run)) for run in runs]
    for run, tested in found:
        _detections_file(run, tested)  # before what takes long: are all there?
    api = _common_truth(found, truth)
    weights = image_weights(len(api.imgs), draws, seed)
    whole = np.ones((len(api.imgs), 1), weights.dtype)
    drawn = []
    for run, tested in tqdm(found, "test images drawn anew", unit="run", disable=None):
        matches = matches_of(
            api, _detections(run, tested, api), metric, **_limits(run, iou_type == "keypoints")
        )
        _check_recorded(run, tested, task, name, float(matches.ap(whole)[0]))
        drawn.append(matches.ap(weights))
    return drawn


def _limits(run: Run, keypoints: bool) -> dict[str, Any]:
    """How the run's evaluator was built."""
    yaml, lazy = "TEST.", "dataloader.evaluator."
    keys = run.settings
    most = keys.get(f"{yaml}DETECTIONS_PER_IMAGE") or keys.get(f"{lazy}detections_per_image") or 100
    sigmas = keys.get(f"{yaml}KEYPOINT_OKS_SIGMAS") or keys.get(f"{lazy}keypoint_sigmas") or ()
    return {"detections_per_image": max(100, most), "keypoint_sigmas": sigmas if keypoints else ()}


def _dataset_of(run: Run) -> str:
    """The only dataset on which a run was tested."""
    named = run.settings.get("DATASETS.TEST") or run.settings.get("dataloader.evaluator.dataset_name")
    names = [named] if isinstance(named, str) else list(named or ())
    folder = run.folder / "inference"
    if len(names) != 1:
        files = glob.glob(f"{glob.escape(str(folder))}/**/{_RESULTS}", recursive=True)
        names = [os.path.dirname(os.path.relpath(file, folder)) for file in files]
    if len(names) == 1:
        return names[0]
    if names:
        raise ValueError(
            f"'{folder}' has detections of {', '.join(sorted(names))}, and no config says which dataset was "
            f"tested last; name the metric with its dataset (--metric DATASET/bbox/AP). {_WITHOUT}"
        )
    raise FileNotFoundError(_no_detections(folder))


def _detections_file(run: Run, dataset: str) -> Path:
    path = run.folder / "inference" / dataset / _RESULTS
    if not path.is_file():
        raise FileNotFoundError(_no_detections(path))
    return path


def _no_detections(path: Path) -> str:
    return (
        f"'{path}' with a run's detections does not exist. COCO's evaluator writes it, VOC's and others do not: "
        f"evaluate the run again (--eval-only) on a dataset of FORMAT coco; {_WITHOUT}"
    )


def _detections(run: Run, dataset: str, api: COCO) -> list[dict[str, Any]]:
    path = _detections_file(run, dataset)
    items = _read(path)
    strange = [
        item for item in items if item["image_id"] not in api.imgs or item["category_id"] not in api.cats
    ]
    if strange:
        what = "{image_id!r} and class {category_id!r}".format(**strange[0])
        raise ValueError(
            f"'{path}': {len(strange)} of {len(items)} detections are of images or classes that the ground truth "
            f"lacks, such as image {what}; give the json of that dataset by --truth. {_WITHOUT}"
        )
    return items


def _check_recorded(run: Run, dataset: str, task: str, name: str, value: float) -> None:
    recorded = run.last.results[task][name]
    if not abs(recorded - value) <= _EQUAL:
        raise ValueError(
            f"'{run.path}': its last evaluation has {task}/{name} {recorded:.2f}, but the detections in "
            f"'{_detections_file(run, dataset)}' give {value:.2f}: they are of another evaluation or other ground "
            f"truth (--truth). Evaluate the run again into another OUTPUT_DIR and compare that one. {_WITHOUT}"
        )


# The ground truth.


def _common_truth(runs: Sequence[tuple[Run, str]], given: str) -> COCO:
    """Raises ValueError if the runs were tested on different images, classes or objects."""
    if given:
        return _api(_read(Path(given)), given)
    (first, dataset), *others = runs
    text = _truth_of(first, dataset)
    content = json.loads(text)
    for other, tested in others:
        other_text = _truth_of(other, tested)
        if other_text != text:
            _check_same(first, content, other, json.loads(other_text))
    return _api(content, f"the ground truth of '{first.path}'")


def _api(content: Any, source: str) -> COCO:
    if not isinstance(content, dict) or not content.get("annotations"):
        raise ValueError(f"{source} has no annotations; expected a COCO json")
    api = COCO()
    api.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        api.createIndex()
    return api


def _truth_of(run: Run, dataset: str) -> str:
    """The json with which a run was evaluated."""
    path = run.folder / "inference" / dataset / _TRUTH
    if path.is_file():
        return path.read_text()
    entries = [
        entry
        for entry in run.settings.get("DATASETS.CUSTOM") or ()
        if isinstance(entry, dict) and entry.get("NAME") == dataset
    ]
    return _registered(dataset, json.dumps(entries))


@functools.lru_cache(maxsize=8)
def _registered(dataset: str, entries: str) -> str:
    """The json with which a registered dataset is evaluated.

    Args:
        entries: of DATASETS.CUSTOM, as json.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog  # it takes seconds

    from ..data import (
        adopt_coco_datasets,
        register_builtin_voc,
        register_custom_datasets,
        register_shapes,
    )
    from ..evaluation.ground_truth import load_annotations, with_ground_truth
    from ..evaluation.isolation import work_folder

    register_shapes()
    register_builtin_voc()
    try:
        register_custom_datasets(json.loads(entries))
        if dataset not in DatasetCatalog.list():
            raise ValueError(f"no dataset '{dataset}' is registered here")
        adopt_coco_datasets([dataset])
        load_annotations(dataset)
        with work_folder(dataset) as folder:
            described = with_ground_truth(dataset, folder)
            return Path(MetadataCatalog.get(described).json_file).read_text()
    except (OSError, ValueError, KeyError) as error:
        raise FileNotFoundError(
            f"the ground truth of '{dataset}' cannot be read: {error}. Give it as COCO json (--truth FILE); "
            f"{_WITHOUT}"
        ) from error


def _check_same(run: Run, content: Any, other: Run, other_content: Any) -> None:
    for what, part in (("classes", _classes), ("images", _images), ("objects", _objects)):
        first, second = part(content), part(other_content)
        if first != second:
            only = ", ".join(map(str, sorted(first ^ second, key=str)[:3]))
            raise ValueError(
                f"'{run.path}' and '{other.path}' were tested on different data: {len(first)} and {len(second)} "
                f"{what}, {len(first ^ second)} of which only one has, such as {only}; compare runs with one test "
                f"set. {_WITHOUT}"
            )


def _classes(content: Any) -> set[Any]:
    return {(item["id"], item["name"]) for item in content["categories"]}


def _images(content: Any) -> set[Any]:
    return {item["id"] for item in content["images"]}


def _objects(content: Any) -> set[Any]:
    return {
        (
            item["image_id"],
            item["category_id"],
            item.get("iscrowd", 0),
            *np.round(item["bbox"], 1).tolist(),
        )
        for item in content.get("annotations", ())
    }


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise OSError(f"'{path}' cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"'{path}' is not JSON: {error}") from error
