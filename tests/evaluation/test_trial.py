"""Ground truth is scored as detections before a run."""

import copy
import functools
import importlib.util
import itertools
import logging
import os
import random

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm
from small_datasets import load, write_voc

from distill_d2.data import register_custom_datasets
from distill_d2.evaluation import build_evaluator, trial, try_evaluator
from distill_d2.testing.tiny import write_dataset

_NUMBERS = itertools.count()
MAP = {1: 0, 2: 1, 3: 2}
KEYPOINTS = [20.5, 20.5, 2.0] * 17


class Data:
    """A dataset of six images with two boxes each that a user registers, and its json."""

    def __init__(self, folder):
        entry = {**write_dataset(folder), "NAME": f"trial_{next(_NUMBERS)}"}
        register_custom_datasets([entry])
        self.records = copy.deepcopy(DatasetCatalog.get(entry["NAME"]))
        self.json_file, self.name = entry["JSON"], f"trial_{next(_NUMBERS)}"
        self.metadata = {"thing_classes": ["class0", "class1", "class2"], "evaluator_type": "coco"}

    @property
    def annotations(self):
        return [item for record in self.records for item in record["annotations"]]

    def use_json(self, categories=MAP):
        self.metadata["json_file"] = self.json_file
        if categories:
            self.metadata["thing_dataset_id_to_contiguous_id"] = categories

    def try_it(self, build=build_evaluator, **options):
        DatasetCatalog.register(self.name, lambda: copy.deepcopy(self.records))
        MetadataCatalog.get(self.name).set(**self.metadata)
        try_evaluator(self.name, self.records, functools.partial(build, self.name), **options)


@pytest.fixture
def data(tmp_path):
    return Data(tmp_path / "data")


def other_ids(data):
    data.use_json()
    for record in data.records:
        record["image_id"] = str(record["image_id"])


def no_boxes(data):
    del data.annotations[0]["bbox"]


def without_package(data):
    if importlib.util.find_spec("lvis"):
        pytest.skip("the package is installed")
    data.use_json()
    data.metadata.update(evaluator_type="lvis")


@pytest.mark.parametrize(
    "change, error, words",
    [
        (other_ids, ValueError, ["6 of 6 image_ids are not in its json_file", "such as '1'", "has 1"]),
        (lambda data: data.use_json({}), ValueError, ["AP50 0.0", "'class0' at", "thing_dataset_id", "[1, 2, 3]"]),
        (lambda data: data.use_json({1: 1, 2: 0, 3: 2}), ValueError, ["AP50 33.3", "0.png' (id 1)", "ids [1, 2]"]),
        (lambda data: data.metadata.update(json_file="no.json"), ValueError, ["'no.json'", "CHECK none"]),
        (lambda data: data.metadata.update(evaluator_type="own"), ValueError, ["evaluator_type 'own'"]),
        (no_boxes, ValueError, ["KeyError: 'bbox'"]),
        (without_package, ImportError, ["not installed", "lvis"]),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_told(data, change, error, words):
    change(data)
    with pytest.raises(error) as caught:
        data.try_it()
    assert all(word in str(caught.value) for word in [data.name, *words]), caught.value


def loses_one_object(data):
    data.use_json()
    data.records[2]["annotations"][0]["bbox"] = [40, 40, 5, 5]


def shifted(data):
    data.use_json()
    for item in data.annotations:
        item["bbox"][0] += 3


def all_crowds(data):
    for item in data.annotations:
        item["iscrowd"] = 1


@pytest.mark.parametrize(
    "change, words",
    [
        (loses_one_object, ["AP50 87.6", "2.png' (id 3): 1 of its 2 objects", "'class1' at [40.0", "ids [5]"]),
        (shifted, ["AP50 100 but AP"]),
        (all_crowds, ["no object that the evaluation of bbox scores"]),
    ],
)  # fmt: skip
def test_what_is_less_than_perfect_is_warned_of(data, caplog, change, words):
    change(data)
    data.try_it()
    (text,) = caplog.messages
    assert all(word in text for word in [data.name, *words]), text


def right_json(data):
    data.use_json()


def equal_boxes(data):
    for item in data.annotations:
        item.update(bbox=[4, 4, 16, 20], category_id=1)


def many_objects(data):
    item = data.annotations[0]
    for number in range(150):
        data.records[3]["annotations"].append({**item, "bbox": [number / 10, 3, 10, 10]})


def tiny_and_fractional(data):
    for number, item in enumerate(data.annotations):
        item["bbox"] = [number + 0.237, 3.11, 0.4, 0.313]


def crowds_and_empty_images(data):
    data.annotations[0]["iscrowd"] = 1
    data.records[4]["annotations"] = []


def with_keypoints(data):
    for item in data.annotations[1:]:
        item["keypoints"] = list(KEYPOINTS)
    # One that is not labeled, far from the corner of the image where its keypoints are said to be.
    data.annotations[0].update(keypoints=[0.0] * 51, bbox=[40, 40, 2, 2])


@pytest.mark.parametrize(
    "change, options",
    [
        (right_json, {"masks": True}),
        (equal_boxes, {}),
        (many_objects, {}),
        (tiny_and_fractional, {}),
        (crowds_and_empty_images, {"masks": True}),
        (with_keypoints, {"keypoints": True}),
    ],
)
def test_usable_data_pass_without_a_word(data, caplog, capfd, change, options):
    change(data)
    data.try_it(**options)
    assert not caplog.messages and capfd.readouterr() == ("", "")


def test_voc(tmp_path, caplog):
    """Also with ids that have folders, spaces and braces, in a folder with braces."""
    root = tmp_path / "voc{1}"
    images = {
        "a/1": [("a", 1, 1, 20, 20)] * 2,
        "x {0}": [("a", 1.0, 1.0, 21.0, 20.0), ("b", 5, 5, 30, 30)],
    }
    for key in ("JPEGImages", "Annotations"):
        (root / key / "a").mkdir(parents=True)
    write_voc(root, images)
    entry = {"NAME": f"trial_{next(_NUMBERS)}", "FORMAT": "voc", "ROOT": str(root), "SPLIT": "train"}
    records = load({**entry, "CLASSES": ["a", "b"]})
    name = entry["NAME"]
    try_evaluator(name, records, functools.partial(build_evaluator, name))
    assert not caplog.messages
    wrong = [{**record, "image_id": number} for number, record in enumerate(records)]
    with pytest.raises(ValueError, match="AP50|cannot be evaluated"):
        try_evaluator(name, wrong, functools.partial(build_evaluator, name))


class Own(DatasetEvaluator):
    """A user's: AP 100, unless it is told to fail; it scores everything, or given images."""

    def __init__(self, fails=False):
        self.fails, self.seen = fails, 0

    def process(self, inputs, outputs):
        self.seen += len(inputs)

    def evaluate(self):
        if self.fails:
            raise KeyError("mine")
        return {"bbox": {"AP": 100.0}}


def test_evaluators_of_a_user(data, monkeypatch):
    """Those of DatasetEvaluators too. One that cannot score some images of a large dataset is not tried."""
    own = DatasetEvaluators([Own(), Own(fails=True)])
    with pytest.raises(ValueError, match="KeyError: 'mine'"):
        data.try_it(lambda *_: own)
    monkeypatch.setattr(trial, "_IMAGES", 5)
    try_evaluator(data.name, data.records, lambda _: own)


@pytest.mark.parametrize("use_json", [True, False])
def test_a_sample_is_scored_against_its_own_ground_truth_and_leaves_no_trace(
    data, monkeypatch, use_json
):
    monkeypatch.setattr(trial, "_IMAGES", 3)
    scored, folders, score = [], [], trial._Trial._score

    def count(self, records, only=None):
        scored.append(len(records))
        return score(self, records, only)

    monkeypatch.setattr(trial._Trial, "_score", count)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)  # without other processes to answer
    if use_json:
        data.use_json()
    before = set(MetadataCatalog.list())

    def build(name, folder):
        folders.append(folder)
        return build_evaluator(name, folder)

    state = random.getstate(), torch.get_rng_state().tolist()
    data.try_it(build)
    assert scored == [3]
    assert (random.getstate(), torch.get_rng_state().tolist()) == state
    assert not os.path.exists(folders[0]) and set(MetadataCatalog.list()) == before | {data.name}
    assert ("json_file" in MetadataCatalog.get(data.name).as_dict()) == use_json
    assert comm.get_world_size() == 2 and logging.root.manager.disable == logging.NOTSET
