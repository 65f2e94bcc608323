"""Annotations in YOLO's form."""

import itertools

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image
from small_datasets import assert_fails, load

from distill_d2.data import check_dataset
from distill_d2.evaluation import try_evaluator
from distill_d2.evaluation.evaluators import build_evaluator

_numbers = itertools.count()


@pytest.fixture
def root(tmp_path):
    """$DETECTRON2_DATASETS/yolo, with three images of 60 x 40 pixels."""
    root = tmp_path / "datasets" / "yolo"
    for folder in ("images/train", "labels/train"):
        (root / folder).mkdir(parents=True)
    for key in "abc":
        Image.new("RGB", (60, 40)).save(root / "images" / "train" / f"{key}.png")
        (root / "labels" / "train" / f"{key}.txt").write_text("1 0.5 0.5 0.5 0.25\r\n")
    return root


def entry(**keys):
    keys = {"IMAGES": "yolo/images/train", "CLASSES": ["cat", "dog"], **keys}
    found = {"NAME": f"yolo_{next(_numbers)}", "FORMAT": "yolo", **keys}
    return {key: value for key, value in found.items() if value is not None}


def test_boxes_and_polygons(root, caplog):
    rows = "1 0.5 0.5 0.5 0.25\n\n0.0 0.1 0.1 0.6 0.1 0.35 0.7\n0 0.95 0.5 0.2 0.2\n0 0.5 0.5 0 0.1\n"
    (root / "labels" / "train" / "a.txt").write_bytes(rows.encode("utf-8-sig"))
    (root / "labels" / "train" / "b.txt").unlink()
    one = entry()
    first, second, third = load(one)
    boxes = [[15, 15, 45, 25], [6, 4, 36, 28], [51, 16, 60, 24]]
    for item, box in zip(first["annotations"], boxes):
        assert item["bbox"] == pytest.approx(box) and item["bbox_mode"] == BoxMode.XYXY_ABS
    assert [item["category_id"] for item in first["annotations"]] == [1, 0, 0]
    assert first["annotations"][1]["segmentation"] == [pytest.approx([6, 4, 36, 4, 21, 28])]
    assert (second["annotations"], second["image_id"]) == ([], "b")
    assert (third["height"], third["width"]) == (40, 60)
    assert "1 of 3 images have no text file" in caplog.text and "dropped 1 boxes" in caplog.text
    check_dataset(one["NAME"], check_images=3, tested=True)
    caplog.clear()
    records = DatasetCatalog.get(one["NAME"])
    try_evaluator(one["NAME"], records, lambda folder: build_evaluator(one["NAME"], folder))
    assert "AP" not in caplog.text


@pytest.mark.parametrize(
    "row, text",
    [
        ("2 0.5 0.5 0.1 0.1", "class 2; expected 0 to 1"),
        ("0.5 0.5 0.5 0.1 0.1", "class 0.5"),
        ("dog 0.5 0.5 0.1 0.1", "expected numbers"),
        ("0,0.5,0.5,0.1,0.1", "expected numbers"),
        ("0 0.5 nan 0.1 0.1", "expected numbers"),
        ("0 30 20 10 10", "fractions"),
        ("0 0.5 0.5 -0.1 0.1", "fractions"),
        ("0 0.5 0.5 0.1 0.1 0.9", "6 numbers; expected class x y width height, or class and"),
        ("0 0.1 0.1 0.5 0.5 0.1 0.1 0.2", "8 numbers"),
    ],
)
def test_wrong_rows_are_told_with_file_and_line(root, row, text):
    (root / "labels" / "train" / "b.txt").write_text(f"1 0.5 0.5 0.1 0.1\n{row}\n")
    assert_fails(entry(), "labels/train/b.txt', line 2, is '" + row, text)


@pytest.mark.parametrize(
    "file, content",
    [
        ("data.yaml", "names: [no, 007]"),
        ("data.yaml", "nc: 2\nnames: {1: 007, 0: no}"),
        ("labels/train/classes.txt", "no\r\n007\r\n"),
        ("images/obj.names", "no\n007"),
    ],
)
def test_classes_of_a_file(root, file, content):
    """They are text, whatever yaml would take them for."""
    (root / file).write_text(content)
    one = entry(CLASSES=None)
    load(one)
    assert MetadataCatalog.get(one["NAME"]).thing_classes == ["no", "007"]


def test_classes_that_are_missing_or_wrong(root):
    assert_fails(entry(CLASSES=None), "does not name its classes; add CLASSES")
    for content in ("path: x", "names: {0: a, 2: b}", "names: [a, a]", "names: ["):
        (root / "data.yaml").write_text(content)
        assert_fails(entry(CLASSES=None), "data.yaml'")


def test_folders_and_splits(root):
    def ids(**keys):
        return [record["image_id"] for record in load(entry(**keys))]

    (root / "list.txt").write_text("./images/train/b.png\n/home/me/yolo/images/train/c.png\n")
    assert ids(SPLIT="yolo/list.txt") == ["b", "c"]
    assert ids(IMAGES="yolo/images") == ["train/a", "train/b", "train/c"]
    parts = [ids(SPLIT={"FRACTION": part}) for part in ([0, 0.7], [0.7, 1])]
    assert sorted(sum(parts, [])) == ["a", "b", "c"] and list(map(len, parts)) == [2, 1]
    (root / "labels" / "train").rename(root / "boxes")
    assert ids(LABELS="yolo/boxes") == ["a", "b", "c"]
    assert_fails(entry(), "no annotations", "images/train/a.txt", "LABELS")
    for file in (root / "boxes").iterdir():
        file.rename(root / "images" / "train" / file.name)
    assert ids() == ["a", "b", "c"]
    Image.new("RGB", (60, 40)).save(root / "images" / "train" / "a.JPG", "jpeg")
    assert_fails(entry(), "1 names with several images", "a.JPG", "share their labels")
    assert_fails(entry(IMAGES="yolo/boxes", LABELS="yolo"), "holds no images")
