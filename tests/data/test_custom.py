"""Datasets named in a config."""

import itertools
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_voc_instances
from detectron2.structures import BoxMode
from small_datasets import OBJECT, assert_fails, load, write_voc

from distill_d2.data import check_dataset, register_custom_datasets

_numbers = itertools.count()


def voc_entry(**changes):
    entry = dict(FORMAT="voc", ROOT="pets", SPLIT="train", CLASSES=["cat", "dog"], YEAR=2007)
    return {"NAME": f"custom_voc_{next(_numbers)}", **entry, **changes}


BOX = {"image_id": 1, "category_id": 7, "area": 100, "iscrowd": 0}
COCO = {
    "info": {},
    "images": [{"id": 1, "file_name": "1.png", "height": 40, "width": 60}],
    "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    "annotations": [{"id": 1, "bbox": [5, 5, 10, 10], **BOX}],
}


def write_coco(folder, **changes):
    (folder / "images").mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(folder / "images" / "1.png"), np.zeros((40, 60, 3), np.uint8))
    (folder / "train.json").write_text(json.dumps({**COCO, **changes}))


def coco_entry(**changes):
    entry = dict(FORMAT="coco", JSON="pets/train.json", IMAGES="pets/images")
    return {"NAME": f"custom_coco_{next(_numbers)}", **entry, **changes}


@pytest.fixture
def root(tmp_path):
    """$DETECTRON2_DATASETS/pets, as conftest.py sets it."""
    return tmp_path / "datasets" / "pets"


@pytest.fixture
def voc(root):
    write_voc(root, {"1": [("dog", 11, 6, 30, 20)], "2": [("cat", 1, 1, 60, 40)], "3": []})
    return root


@pytest.fixture
def coco(root):
    write_coco(root)
    return root


# What is read


def test_voc_is_what_detectron2_reads(voc):
    expected = load_voc_instances(str(voc), "train", ["cat", "dog"])
    assert load(voc_entry()) == expected
    assert expected[0]["annotations"][0]["bbox"] == [10, 5, 30, 20]


def test_bccd_is_what_detectron2_reads(shared):
    classes = ["RBC", "WBC", "Platelets"]
    records = load(voc_entry(ROOT=str(shared / "data" / "bccd"), CLASSES=classes))
    assert records == load_voc_instances(str(shared / "data" / "bccd"), "train", classes)
    assert len(records) == 205 and sum(len(record["annotations"]) for record in records) == 2804


def test_nuclei_by_a_relative_path(shared, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shared / "data"))
    paths = dict(JSON="nuclei/annotations/val.json", IMAGES="nuclei/images")
    dicts = load(coco_entry(**paths, CLASSES=["nucleus"]))
    assert len(dicts) == 45 and sum(len(record["annotations"]) for record in dicts) == 1466
    assert all("segmentation" in item for record in dicts for item in record["annotations"])
    assert all(Path(record["file_name"]).is_file() for record in dicts)


def test_voc_metadata_is_what_the_evaluator_needs(voc):
    entry = voc_entry()
    del entry["YEAR"]
    register_custom_datasets([entry])
    metadata = MetadataCatalog.get(entry["NAME"])
    assert metadata.evaluator_type == "pascal_voc" and metadata.year == 2007
    assert metadata.dirname == str(voc) and metadata.split == "train"
    assert metadata.thing_classes == ["cat", "dog"]


def test_voc_split_with_columns_blank_lines_and_repeats(voc):
    (voc / "ImageSets" / "Main" / "train.txt").write_text("1 -1\n\n2  1\n1 1\n")
    assert [record["image_id"] for record in load(voc_entry())] == ["1", "2"]


@pytest.mark.parametrize("suffix", [".png", ".JPG"])
def test_voc_images_of_other_suffixes(root, suffix):
    write_voc(root, {"1": [("dog", 1, 1, 9, 9)]}, suffix=suffix)
    (root / "JPEGImages" / "1.txt").write_text("not an image")
    assert load(voc_entry())[0]["file_name"] == str(root / "JPEGImages" / f"1{suffix}")


def test_boxes_without_area_are_dropped_and_counted(root, caplog):
    boxes = [(5, 5, 5, 9), (5, 9, 9, 5), (0, 0, 0, 0), (61, 1, 70, 9), (-9, 1, -1, 9), (1, 1, 2, 2)]
    write_voc(root, {"1": [("dog", *box) for box in boxes]})
    (record,) = load(voc_entry(CLASSES=["dog"]))
    assert [item["bbox"] for item in record["annotations"]] == [[0, 0, 2, 2]]
    assert "dropped 5 boxes" in caplog.text
    boxes = [[1, 1, 0, 5], [1, 1, 5, 0], [1, 1, -2, 5], [1, 1, 4, 5]]
    write_coco(root, annotations=[{"id": i + 1, "bbox": box, **BOX} for i, box in enumerate(boxes)])
    (record,) = load(coco_entry())
    assert [item["bbox"] for item in record["annotations"]] == [[1, 1, 4, 5]]
    assert "dropped 3 boxes" in caplog.text


def test_coco_categories_follow_their_ids(coco):
    entry = coco_entry(CLASSES=["cat", "dog"])
    (record,) = load(entry)
    assert MetadataCatalog.get(entry["NAME"]).thing_classes == ["cat", "dog"]
    assert record["annotations"][0]["category_id"] == 1
    assert record["annotations"][0]["bbox_mode"] == BoxMode.XYWH_ABS
    assert record["file_name"] == str(coco / "images" / "1.png")


# Registration


def test_registering_twice_is_registering_once(voc, coco):
    entries = [voc_entry(), coco_entry()]
    for _ in range(2):
        register_custom_datasets([dict(entry) for entry in entries])
    assert len(DatasetCatalog.get(entries[0]["NAME"])) == 3


def test_name_of_another_entry(voc, tmp_path, monkeypatch):
    """Also the same entry below another folder."""
    entry = voc_entry()
    register_custom_datasets([entry])
    texts = entry["NAME"], "another dataset", str(voc), "choose another"
    assert_fails({**entry, "CLASSES": ["dog", "cat"]}, *texts)
    write_voc(tmp_path / "other" / "pets", {"1": [("dog", 1, 1, 9, 9)]})
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "other"))
    assert_fails(entry, *texts)


@pytest.mark.parametrize(
    "changes, texts",
    [
        (dict(FORMAT="xml"), ["FORMAT is 'xml'", "['coco', 'images', 'voc', 'yolo']"]),
        (dict(FORMAT=None), ["FORMAT is None"]),
        (dict(CLASES=["cat"]), ["unknown keys ['CLASES']", "'CLASSES'"]),
        (dict(CLASSES="cat"), ["CLASSES", "'cat'", "expected a list"]),
        (dict(CLASSES=[]), ["CLASSES", "[]"]),
        (dict(CLASSES=["cat", "cat"]), ["CLASSES", "different names"]),
        (dict(CLASSES=["cat", False]), ["False", "in quotes"]),
        (dict(YEAR=2010), ["YEAR", "2010", "2007 (11-point AP) or 2012 (area AP)"]),
        (dict(SPLIT=7), ["SPLIT is 7", "expected a string or"]),
        (dict(NAME="coco_2017_train"), ["coco_2017_train", "not from DATASETS.CUSTOM"]),
    ],
)
def test_wrong_entries(voc, changes, texts):
    assert_fails(voc_entry(**changes), *texts)


# Paths


@pytest.mark.parametrize(
    "entry, texts",
    [
        (voc_entry(ROOT="cats"), ["file", "cats/ImageSets/Main/train.txt", "['pets']", "DETECTRON2"]),
        (voc_entry(SPLIT="test"), ["Main/test.txt", "['train.txt']"]),
        (coco_entry(JSON="pets/val.json"), ["pets/val.json", "'train.json'"]),
        (coco_entry(IMAGES="pets/pngs"), ["the folder", "pets/pngs", "'images'"]),
        (coco_entry(JSON="pets/images"), ["the file", "pets/images"]),
    ],
)
def test_missing_paths_say_what_was_found(voc, coco, entry, texts):
    assert_fails(entry, entry["NAME"], *texts, error=FileNotFoundError)
    assert entry["NAME"] not in DatasetCatalog.list()


@pytest.mark.parametrize("folder", ["Annotations", "JPEGImages"])
def test_missing_voc_folder(voc, folder):
    (voc / folder).rename(voc / "renamed")
    assert_fails(voc_entry(), folder, "'renamed'", error=FileNotFoundError)


# Annotations


def test_classes_that_differ(voc, coco):
    texts = ["['dog']", "'1.xml'", "['cat', 'bird']", "annotations hold ['cat', 'dog']"]
    assert_fails(voc_entry(CLASSES=["cat", "bird"]), *texts)
    assert_fails(coco_entry(CLASSES=["dog", "cat"]), "['dog', 'cat']", "['cat', 'dog']", "train.json")


def test_no_annotations(root):
    write_voc(root, {"1": [], "2": []})
    assert_fails(voc_entry(), "no annotations", str(root), "2 images")
    (root / "ImageSets" / "Main" / "empty.txt").write_text("\n")
    assert_fails(voc_entry(SPLIT="empty"), "no annotations", "0 images")
    lacking = {key: value for key, value in COCO.items() if key != "annotations"}
    for content in (lacking, {**lacking, "annotations": []}):  # images to test on
        write_coco(root)
        (root / "train.json").write_text(json.dumps(content))
        entry = coco_entry()
        assert [record["annotations"] for record in load(entry)] == [[]]
        check_dataset(entry["NAME"], need_annotations=False, tested=True)
        with pytest.raises(ValueError, match="no annotations: 1 images and no boxes"):
            check_dataset(entry["NAME"])


SIZE = "<annotation><size><width>{}</width><height>4</height></size>{}</annotation>"


@pytest.mark.parametrize(
    "content, text",
    [
        ("<annotation><size>", "2.xml"),
        ("<annotation></annotation>", "no <size><width>"),
        (SIZE.format(0, ""), "0 x 4"),
        (SIZE.format(9, OBJECT.format("cat", 1, "a", 3, 3)), "'a'"),
    ],
)
def test_malformed_xml_is_named(voc, content, text):
    (voc / "Annotations" / "2.xml").write_text(content)
    assert_fails(voc_entry(), "cannot read", "2.xml", text)


@pytest.mark.parametrize(
    "content, text",
    [
        ('{"images": [', "JSONDecodeError"),
        (json.dumps(COCO).replace('"category_id": 7', '"category_id": 4'), "category_id 4"),
        ("[]", "train.json"),
        ("{}", "categories"),
    ],
)
def test_malformed_json_is_named(coco, content, text):
    (coco / "train.json").write_text(content)
    assert_fails(coco_entry(), "cannot read", "train.json", text)
