"""COCO json files as other tools write them: corrected for training and evaluation, or told."""

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.data.datasets.coco import convert_to_coco_dict
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from distill_d2.data import (
    adopt_coco_datasets,
    check_dataset,
    check_datasets,
    coco_reading,
    register_custom_datasets,
)
from distill_d2.evaluation import build_evaluator
from distill_d2.evaluation.ground_truth import of_records, with_ground_truth
from distill_d2.testing.tiny import tiny_config

_numbers = itertools.count()
SQUARE = [5, 5, 25, 5, 25, 15, 5, 15]
PAIRS = [[5, 5], [25, 5], [25, 15], [5, 15]]
RLE = {"size": [40, 60], "counts": [200, 10, 2190]}
#: Right in every respect: two images, three annotations.
CONTENT = {
    "images": [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 60} for i in (1, 2)],
    "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
    "annotations": [
        {
            **dict(id=i, image_id=image, category_id=label, bbox=[5, 5, 20, 10], area=200, iscrowd=0),
            "segmentation": mask,
        }
        for i, image, label, mask in ((1, 1, 3, [SQUARE]), (2, 2, 7, [SQUARE]), (3, 2, 3, RLE))
    ],
}


def changed(section, index, **values):
    """A function that changes an item; None removes a key."""

    def change(content):
        content[section][index].update(values)
        for key in [key for key, value in values.items() if value is None]:
            del content[section][index][key]

    return change


def everywhere(section, function):
    return lambda content: [function(item) for item in content[section]]


@pytest.fixture
def entry(tmp_path):
    for i in (1, 2):
        Image.new("RGB", (60, 40)).save(tmp_path / f"{i}.png")
    name = f"coco_{next(_numbers)}"
    return {"NAME": name, "FORMAT": "coco", "JSON": str(tmp_path / "a.json"), "IMAGES": str(tmp_path)}


def write(entry, *changes):
    content = copy.deepcopy(CONTENT)
    for change in changes:
        change(content)
    with open(entry["JSON"], "w") as file:
        json.dump(content, file)


def load(entry):
    register_custom_datasets([entry])
    check_dataset(entry["NAME"], tested=True)
    return DatasetCatalog.get(entry["NAME"])


def score_truth(name, folder):
    """AP of the records' own boxes as detections."""
    evaluator = build_evaluator(name, str(folder))
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        items = record["annotations"]
        boxes = torch.tensor([item["bbox"] for item in items], dtype=torch.float32).reshape(-1, 4)
        found = Instances((record["height"], record["width"]), scores=torch.ones(len(items)))
        found.pred_boxes = Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
        found.pred_classes = torch.tensor([item["category_id"] for item in items])
        evaluator.process([record], [{"instances": found}])
    return evaluator.evaluate()["bbox"]["AP"]


KEYPOINTS = {"keypoints": [10, 10, 2, 20, 12, 1, 0, 0, 0], "num_keypoints": 2}
NAMES = {"keypoints": ["left_eye", "right_eye", "tip"], "skeleton": [[1, 2], [2, 3]]}


def test_a_right_json_is_what_detectron2_reads(entry, tmp_path, caplog):
    write(entry, changed("annotations", 0, **KEYPOINTS), changed("categories", 0, **NAMES))
    expected = load_coco_json(entry["JSON"], entry["IMAGES"], f"{entry['NAME']}_plain")
    caplog.clear()
    assert load(entry) == expected
    assert "Dataset" not in caplog.text
    assert expected[0]["annotations"][0]["keypoints"][:3] == [10.5, 10.5, 2]
    metadata, plain = (MetadataCatalog.get(entry["NAME"] + end) for end in ("", "_plain"))
    for key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
        assert metadata.get(key) == plain.get(key)
    assert metadata.keypoint_flip_map == [("left_eye", "right_eye")]
    assert [line[:2] for line in metadata.keypoint_connection_rules] == [
        ("left_eye", "right_eye"),
        ("right_eye", "tip"),
    ]
    assert score_truth(entry["NAME"], tmp_path / "out") > 99.9
    assert not (tmp_path / "out" / "inference" / entry["NAME"] / "ground_truth.json").exists()


@pytest.mark.parametrize(
    "changes, text, count",
    [
        ([everywhere("annotations", lambda item: item.pop("iscrowd"))], "3 iscrowd were missing", 3),
        ([changed("annotations", 1, iscrowd="0")], "1 iscrowd were", 3),
        ([everywhere("annotations", lambda item: item.pop("area"))], "3 areas were missing", 3),
        ([changed("annotations", 1, area=float("nan"))], "1 areas were missing", 3),
        ([everywhere("annotations", lambda i: i.update(id=i["id"] - 1))], "3 were numbered from 1", 3),
        ([changed("annotations", 2, id=2**70)], "ids were missing, repeated, too large", 3),
        ([changed("annotations", 2, id=1)], "ids were missing, repeated", 3),
        ([changed("annotations", 2, id=None)], "ids were missing", 3),
        ([changed("annotations", 0, bbox=None)], "1 boxes were missing", 3),
        ([changed("annotations", 0, bbox=["5", "5", "20", "10"])], "boxes of text", 3),
        ([changed("annotations", 0, bbox=[5, 5, -20, 10])], "dropped 1 boxes without area", 2),
        ([changed("annotations", 0, segmentation=[[5, 5, 25, 15]])], "1 annotations without another", 2),
        ([changed("annotations", 0, segmentation=[SQUARE, [5, 5]])], "1 polygons of fewer than 3", 3),
        ([changed("annotations", 0, segmentation=SQUARE)], "1 polygons of another nesting", 3),
        ([changed("annotations", 0, segmentation=PAIRS)], "1 polygons of another nesting", 3),
        ([changed("annotations", 0, segmentation=[PAIRS])], "1 polygons of another nesting", 3),
        ([changed("annotations", 0, segmentation=[["5"] * 8])], "or not of numbers", 2),
        (
            [everywhere("annotations", lambda i: i.update(segmentation=[[5, 5]]))],
            "3 polygons of fewer",
            3,
        ),
        ([changed("annotations", 0, image_id=99)], "1 annotations of no image", 2),
        ([everywhere("annotations", lambda i: i.update(image_id=str(i["image_id"])))], "3 image_ids", 3),
        ([everywhere("categories", lambda i: i.update(id=str(i["id"])))], "ids of categories", 3),
        ([changed("images", 0, id="1")], "ids of images were converted to int", 3),
        ([changed("images", 0, id="one"), changed("annotations", 0, image_id="one")], "to str", 3),
        ([changed("images", 0, height="40"), changed("images", 1, width=60.0)], "2 image sizes", 3),
        ([changed("images", 0, height=None)], "1 image sizes were missing", 3),
        ([changed("categories", 0, name=8)], "category's name 8 is taken as text", 3),
    ],
)
def test_what_can_be_corrected_is_for_training_and_evaluation(
    entry, tmp_path, changes, text, count, caplog
):
    write(entry, *changes)
    dicts = load(entry)
    assert text in caplog.text
    items = [item for record in dicts for item in record["annotations"]]
    assert len(items) == count and all(
        item["bbox"] == [5, 5, 20, 10] or text[:1] == "1" for item in items
    )
    assert [(record["height"], record["width"]) for record in dicts] == [(40, 60)] * 2
    assert score_truth(entry["NAME"], tmp_path / "out") > 99.9


@pytest.mark.parametrize(
    "changes, texts",
    [
        ([changed("images", 1, id=1)], ["image ids are repeated", "'1.png' and '2.png'"]),
        ([changed("images", 1, file_name=None)], ["image of id 2 has no file_name"]),
        ([changed("images", 1, id=None)], ["'2.png' has no id"]),
        ([changed("images", 1, file_name="3.png", width=None)], ["3.png' cannot be used"]),
        ([changed("categories", 1, id=3)], ["two categories have the id 3", "'cat'", "'dog'"]),
        ([changed("categories", 1, name="cat")], ["two categories have the name 'cat'", "7"]),
        ([changed("categories", 1, name=None)], ["no id or no name"]),
        ([changed("annotations", 1, category_id=4)], ["1 of 3", "id 2", "category_id 4", "[3, 7]"]),
        ([changed("annotations", 1, category_id=None)], ["1 of 3 annotations have no category_id"]),
        ([everywhere("annotations", lambda i: i.update(image_id=50))], ["none of the 3", "50"]),
        (
            [changed("annotations", 1, bbox=[1, 2, float("nan"), 4])],
            ["1 of 3 annotations have a box with NaN", "id 2"],
        ),
        ([changed("annotations", 1, bbox=[1, 2, 3])], ["id 2", "[1, 2, 3]", "expected 4 numbers"]),
        (
            [changed("annotations", 1, bbox=None, segmentation=None)],
            ["id 2", "neither a bbox nor a mask"],
        ),
        ([changed("annotations", 1, ignore=1)], ["1 of 3 annotations have 'ignore'", "iscrowd 1"]),
        ([changed("annotations", 1, iscrowd="yes")], ["iscrowd 'yes'", "expected 0 or 1"]),
        ([changed("annotations", 1, segmentation="x")], ["id 2", "expected polygons"]),
        (
            [changed("annotations", 2, segmentation={"size": [8, 8]})],
            ["id 3", "segmentation {'size': [8, 8]}"],
        ),
        (
            [changed("annotations", 2, segmentation={"size": [8, 8], "counts": [-1, 65]})],
            ["id 3", "the number of pixels"],
        ),
        (
            [changed("annotations", 2, segmentation={"size": [8, 8], "counts": [10**12]})],
            ["id 3", "the number of pixels"],
        ),
        (
            [changed("annotations", 1, keypoints=[1, None, 2])],
            ["1 of 3 annotations have keypoints that are not numbers", "id 2", "[1, None, 2]"],
        ),
    ],
)
def test_what_cannot_be_corrected_is_told(entry, changes, texts):
    write(entry, *changes)
    with pytest.raises(ValueError) as caught:
        load(entry)
    assert all(text in str(caught.value) for text in ["a.json", *texts])


def test_boxes_of_corners(entry, tmp_path):
    write(entry, everywhere("annotations", lambda item: item.update(bbox=[25, 15, 55, 35], area=None)))
    with pytest.raises(ValueError, match="3 of 3 boxes leave their image.*BOXES: corners"):
        load(entry)
    entry.update(NAME=entry["NAME"] + "_corners", BOXES="corners")
    assert load(entry)[0]["annotations"][0]["bbox"] == [25, 15, 30, 20]
    assert score_truth(entry["NAME"], tmp_path / "out") > 99.9


def test_categories_that_the_json_lacks(entry, tmp_path, caplog):
    """A test set may lack a class; the others keep their numbers, and are evaluated."""
    write(entry)
    dicts = load({**entry, "CLASSES": ["ant", "cat", "cow", "dog"]})
    assert "lack ['ant', 'cow'] of CLASSES" in caplog.text
    labels = [item["category_id"] for record in dicts for item in record["annotations"]]
    assert labels == [1, 3, 1]
    assert MetadataCatalog.get(entry["NAME"]).thing_classes == ["ant", "cat", "cow", "dog"]
    assert score_truth(entry["NAME"], tmp_path / "out") > 99.9


def test_encodings_and_separators(entry, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "2.png").rename(tmp_path / "sub" / "2.png")
    content = {
        **CONTENT,
        "images": [CONTENT["images"][0], {**CONTENT["images"][1], "file_name": "sub\\2.png"}],
    }
    for encoding in ("utf-8-sig", "utf-16"):
        with open(entry["JSON"], "w", encoding=encoding) as file:
            json.dump(content, file)
        entry["NAME"] += encoding
        assert load(entry)[1]["file_name"] == str(tmp_path / "sub" / "2.png")
        assert score_truth(entry["NAME"], tmp_path / "out") > 99.9


def test_datasets_that_a_user_registered(entry, tmp_path):
    write(entry, everywhere("annotations", lambda item: item.pop("iscrowd") or item.pop("id")))
    register_coco_instances(entry["NAME"], {}, entry["JSON"], entry["IMAGES"])
    register_coco_instances(
        f"{entry['NAME']}_2", {"thing_classes": ["a"]}, entry["JSON"], entry["IMAGES"]
    )
    adopt_coco_datasets([entry["NAME"], f"{entry['NAME']}_2", "no_such_dataset"])
    with pytest.raises(
        ValueError, match=r"thing_classes in its metadata is \['a'\], but the categories"
    ):
        DatasetCatalog.get(f"{entry['NAME']}_2")
    assert score_truth(entry["NAME"], tmp_path / "out") > 99.9


def test_annotations_without_a_json_are_never_stale(tmp_path):
    """detectron2 would evaluate with those of an earlier run in the same folder."""
    record = {"file_name": "1.png", "image_id": 1, "height": 40, "width": 60}
    for box in ([5, 5, 20, 10], [30, 20, 20, 10]):
        item = {"bbox": np.array(box), "bbox_mode": BoxMode.XYWH_ABS, "category_id": np.int64(0)}
        dicts, name = [{**record, "annotations": [item]}], "coco_of_records"
        DatasetCatalog.register(name, lambda dicts=dicts: copy.deepcopy(dicts))
        MetadataCatalog.get(name).set(evaluator_type="coco", thing_classes=["a"])
        for _ in range(2):
            assert score_truth(name, tmp_path) > 99.9
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_records_become_the_content_that_detectron2_makes(entry, tmp_path):
    write(entry, changed("annotations", 0, **KEYPOINTS), changed("categories", 0, **NAMES))
    name = f"{entry['NAME']}_records"
    dicts = load(entry)
    dicts[0]["annotations"][0].update(bbox=np.array([5.0, 5, 25, 15]), bbox_mode=BoxMode.XYXY_ABS)
    dicts[1]["annotations"][0].pop("segmentation")
    DatasetCatalog.register(name, lambda: copy.deepcopy(dicts))
    values = MetadataCatalog.get(entry["NAME"]).as_dict()
    keys = ("evaluator_type", "thing_classes", "thing_dataset_id_to_contiguous_id")
    MetadataCatalog.get(name).set(**{key: values[key] for key in keys})
    with open(MetadataCatalog.get(with_ground_truth(name, str(tmp_path))).json_file) as file:
        content = json.load(file)
    expected = json.loads(json.dumps(convert_to_coco_dict(name)))
    for key in ("images", "categories", "annotations"):
        assert content[key] == expected[key]


def test_a_share_of_the_images(entry, tmp_path):
    write(entry)
    found = []
    for part in ([0, 0.5], [0.5, 1.0]):
        name = f"{entry['NAME']}_{part}"
        found += load({**entry, "NAME": name, "SPLIT": {"FRACTION": part, "SEED": 1}})
        assert score_truth(name, tmp_path / "out") > 99.9
    assert sorted(record["image_id"] for record in found) == [1, 2]


def test_keypoints_are_named_before_training(entry):
    cfg = tiny_config("faster")
    cfg.MODEL.KEYPOINT_ON, cfg.MODEL.ROI_HEADS.NUM_CLASSES = True, 2
    cfg.DATASETS.CHECK_IMAGES = 0
    write(entry, everywhere("annotations", lambda item: item.update(KEYPOINTS)))
    names = ["nose", "ear", "tip"]
    for number, (keys, points, text) in enumerate(
        [
            ({}, 3, "does not name its keypoints; add KEYPOINTS"),
            ({"KEYPOINTS": names}, 3, "add FLIPS"),
            ({"KEYPOINTS": names, "FLIPS": []}, 17, "NUM_KEYPOINTS is 17; set it to 3"),
            ({"KEYPOINTS": names, "FLIPS": [["nose", "eye"]]}, 3, r"keypoints \['eye'\]"),
            (
                {"KEYPOINTS": names[:2], "FLIPS": []},
                2,
                "has 9 numbers as keypoints; expected .* 6 numbers",
            ),
            ({"KEYPOINTS": names, "FLIPS": [["nose", "ear"]]}, 3, None),
        ]
    ):
        cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = points
        name = f"{entry['NAME']}_{number}"
        register_custom_datasets([{**entry, **keys, "NAME": name}])
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
        if text is None:
            check_datasets(cfg)
        else:
            with pytest.raises(ValueError, match=text):
                check_datasets(cfg)
    cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE = 5
    with pytest.raises(ValueError, match="no image has more than 4 visible keypoints.*PER_IMAGE"):
        check_datasets(cfg)


def test_checks_read_a_json_once_and_score_a_part_of_it(entry, tmp_path, monkeypatch):
    reads, parse = [], coco_reading._parse
    monkeypatch.setattr(coco_reading, "_parse", lambda file: reads.append(file) or parse(file))
    write(entry, everywhere("annotations", lambda item: item.pop("iscrowd")))
    register_custom_datasets([entry])

    def ids():
        with open(
            MetadataCatalog.get(with_ground_truth(entry["NAME"], str(tmp_path))).json_file
        ) as file:
            content = json.load(file)
        return [[item["id"] for item in content[key]] for key in ("images", "annotations")]

    with coco_reading.kept_content(), of_records(DatasetCatalog.get(entry["NAME"])[1:]):
        assert ids() == [[2], [2, 3]] and len(reads) == 1
    assert ids() == [[1, 2], [1, 2, 3]] and len(reads) == 2
