"""Records of a user's own code."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from distill_d2.data import check_dataset
from distill_d2.testing.tiny import write_dataset

_numbers = itertools.count()
NAN = float("nan")


@pytest.fixture
def paths(tmp_path):
    write_dataset(tmp_path / "data")
    return sorted((tmp_path / "data" / "images").iterdir())[1::2]


def records(paths, changes=(), of_item=(), count=3):
    """Of 64 x 48 pixels, two boxes each; those of the second image are changed."""
    found = []
    for number, path in enumerate(paths[:count]):
        boxes = [[5, 6, 20, 30], [1.5, 2, 9, 7]]
        items = [{"bbox": b, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1} for b in boxes]
        found.append({"file_name": str(path), "image_id": number, "height": 48, "width": 64})
        found[-1]["annotations"] = items
    for key, value in dict(changes).items():
        found[1][key] = value
    for key, value in dict(of_item).items():
        found[1]["annotations"][1][key] = value
    return [{k: v for k, v in record.items() if v is not None} for record in found]


def check(dicts, **metadata):
    name = f"records_{next(_numbers)}"
    DatasetCatalog.register(name, lambda: dicts)
    MetadataCatalog.get(name).set(thing_classes=["a", "b"], **metadata)
    check_dataset(name, ("MODEL.X", 2), 2, tested=True)


@pytest.mark.parametrize(
    "changes, of_item",
    [
        ({"annotations": []}, {}),
        ({"image_id": "a b{}"}, {"bbox": np.array([1.0, 2, 3, 4]), "bbox_mode": 0}),
        ({"height": np.int64(48)}, {"bbox_mode": 1, "category_id": np.int32(0)}),
        ({}, {"bbox": (1, 2, 3, 4), "bbox_mode": 0, "category_id": 1.0}),
    ],
)
def test_what_detectron2_reads_is_right(paths, changes, of_item, caplog):
    check(records([Path(path) for path in paths], changes, of_item))
    assert "Dataset" not in caplog.text


@pytest.mark.parametrize(
    "changes, of_item, texts",
    [
        ({"file_name": None}, {}, ["1 of 3 records have no 'file_name'", "image_id 1", "INPUT.MAPPER"]),
        ({"file_name": 7}, {}, ["file_name is 7 in record 1"]),
        ({"image_id": None}, {}, ["no 'image_id'", "3.png", "evaluator"]),
        ({"image_id": np.int64(1)}, {}, ["1 image ids are not int or str", "np.int64(1)"]),
        ({"image_id": 2}, {}, ["1 image ids are repeated; 2 images have the id 2", "3.png", "5.png"]),
        ({"height": None}, {}, ["no 'height'", "3.png"]),
        ({"annotations": None}, {}, ["1 of 3 records have no 'annotations'", "empty list"]),
        ({"width": "64"}, {}, ["width is '64' (str)", "3.png"]),
        ({"width": 10**9}, {}, ["width is 1000000000"]),
        ({"width": NAN}, {}, ["width is nan (float)"]),
        ({}, {"bbox": None}, ["1 of 6 annotations have no 'bbox'", "number 1 (from 0) of", "3.png"]),
        ({}, {"bbox_mode": None}, ["no 'bbox_mode'"]),
        ({}, {"bbox_mode": BoxMode.XYXY_REL}, ["a bbox_mode that", "XYXY_REL"]),
        ({}, {"bbox_mode": "XYXY_ABS"}, ["a bbox_mode that", "'XYXY_ABS'"]),
        ({}, {"category_id": 2}, ["category_id out of range", "category_id 2;", "0 to 2 - 1"]),
        ({}, {"category_id": -1}, ["category_id out of range"]),
        ({}, {"category_id": "1"}, ["not an integer", "'1'"]),
        ({}, {"category_id": 0.5}, ["not an integer"]),
        ({}, {"bbox": [1, 2, NAN, 4]}, ["1 of 6 annotations have a box with NaN or inf", "nan"]),
        ({}, {"bbox": np.array([1, 2, 3, 4])}, ["XYWH_ABS that is not a list", "bbox.tolist()"]),
        ({}, {"bbox": [1, 2, 3]}, ["a box that is not 4 numbers", "[1, 2, 3]"]),
        ({}, {"bbox": ["1", "2", "3", "4"]}, ["a box that is not 4 numbers", "3.png"]),
    ],
)
def test_what_it_cannot_read_is_told(paths, changes, of_item, texts):
    with pytest.raises(ValueError) as caught:
        check(records(paths, changes, of_item))
    assert all(text in str(caught.value) for text in texts), caught.value


@pytest.mark.parametrize(
    "bbox, text",
    [([1, 2, -3, 4], "1 of 6 boxes are without area"), ([70, 2, 9, 9], "1 of 6 boxes are outside")],
)
def test_boxes_that_are_not_trained_on_are_counted(paths, bbox, text, caplog):
    check(records(paths, {}, {"bbox": bbox}))
    assert text in caplog.text and "3.png" in caplog.text


def test_what_is_not_a_list_of_dicts_is_told(paths):
    for dicts, text in (
        (["a.png"], "returned .*a.png.*; expected a list"),
        (iter(()), "expected a list of dicts"),
        ([], "no images"),
    ):
        with pytest.raises(ValueError, match=text):
            check(dicts)


def test_crowds_alone_are_told(paths):
    dicts = records(paths)
    for record in dicts:
        record["annotations"] = [{**item, "iscrowd": 1} for item in record["annotations"]]
    with pytest.raises(ValueError, match="no annotations but crowds"):
        check(dicts)


def test_images_that_are_named_twice_are_counted(paths, caplog):
    check(records([paths[0], paths[0], paths[1]]))
    assert "1 images are named by several records" in caplog.text and "1.png" in caplog.text


def test_boxes_that_are_all_alike_wrong_are_told(paths):
    for boxes, texts in (
        ([[70, 2, 9, 9], [1, 50, 9, 9]], ["all 6 boxes", "outside their image (6)", "XYWH_ABS"]),
        ([[0.1, 0.2, 0.5, 0.5], [0, 0, 1, 1]], ["all 6 boxes lie between 0 and 1", "Multiply them"]),
        ([[30, 20, 60, 40], [5, 6, 20, 30]], ["3 of 6 boxes leave", "BOXES: corners", "XYXY_ABS"]),
    ):
        dicts = records(paths)
        for record in dicts:
            for item, bbox in zip(record["annotations"], boxes):
                item["bbox"] = bbox
        with pytest.raises(ValueError) as caught:
            check(dicts)
        assert all(text in str(caught.value) for text in texts), caught.value
    for record in dicts:
        record["annotations"][1]["bbox"] = [20, 6, 10, 30]  # not corners: x1 < x0
    check(dicts)
