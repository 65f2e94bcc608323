"""VOC data as users have it: lists, folders, encodings."""

import itertools
import os

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from small_datasets import assert_fails, load, write_voc

from distill_d2.data import check_dataset, register_custom_datasets
from distill_d2.evaluation import try_evaluator
from distill_d2.evaluation.evaluators import build_evaluator

_numbers = itertools.count()
BOX = [("dog", 11, 6, 30, 20)]


@pytest.fixture
def root(tmp_path):
    """$DETECTRON2_DATASETS/pets, as conftest.py sets it."""
    return tmp_path / "datasets" / "pets"


def entry(**places):
    places = places or {"ROOT": "pets", "SPLIT": "train"}
    return {"NAME": f"voc_{next(_numbers)}", "FORMAT": "voc", "CLASSES": ["dog"], **places}


def ids(one):
    return [record["image_id"] for record in load(one)]


def write(root, keys, content=None, encoding="utf-8"):
    for key in keys:
        for folder in ("Annotations", "JPEGImages"):
            (root / folder / key).parent.mkdir(parents=True, exist_ok=True)
    write_voc(root, dict.fromkeys(keys, BOX))
    if content is not None:
        (root / "ImageSets" / "Main" / "train.txt").write_bytes(content.encode(encoding))


@pytest.mark.parametrize(
    "keys, content, encoding",
    [
        (["a", "b"], "a\r\nb\r\n", "utf-8-sig"),
        (["a", "b"], "a\r\nb\r\n", "utf-16"),
        (["a", "b"], "a\nb", "utf-16-be"),
        (["é", "猫"], "é\n猫\n", "utf-8"),
        (["a", "b"], "a -1\nb  1\n", "utf-8"),
        (["a", "b"], "a 1 left\nb 0 right\n", "utf-8"),
        (["img 1", "img 2"], "img 1\nimg 2\n", "utf-8"),
        (["img", "img 1"], "img\nimg 1\n", "utf-8"),
        (["img 1", "img 2"], "img 1 -1\nimg 2  1\n", "utf-8"),
        (["a/1", "b/1"], "a/1\nb/1\n", "utf-8"),
        (["a/1", "b/1"], "a\\1.jpg\n./JPEGImages/b/1.jpg\n", "utf-8"),
        (["a.b", "c{}"], "a.b\n/data/pets/Annotations/c{}.xml\nc{}\n", "utf-8"),
    ],
)
def test_lists_are_read_and_evaluated(root, keys, content, encoding):
    write(root, [*keys, "other"], content, encoding)
    one = entry()
    assert ids(one) == keys
    check_dataset(one["NAME"], check_images=9, tested=True)
    records = DatasetCatalog.get(one["NAME"])
    try_evaluator(one["NAME"], records, lambda folder: build_evaluator(one["NAME"], folder))


def test_unclear_and_missing_lines_are_told(root):
    write(root, ["img", "img 1"], "img 1\n")
    assert_fails(entry(), "'img 1' may be the image 'img 1', or the image 'img'", "both exist")
    write(root, ["img", "img 1"], "img 2\nnone.jpg\n")
    assert_fails(entry(), "1 of 2 lines", "train.txt' name nothing in", "'none.jpg'", "['img', 'img 1']")
    write(root, ["img"], "\xff\n", "latin-1")
    assert_fails(entry(), "train.txt' is not text in UTF-8")
    write(root, ["img"], "\n")
    assert_fails(entry(), "no annotations", "0 images")


def test_images_of_any_ending(root):
    write_voc(root, {"a": BOX, "b": BOX, "c": BOX}, suffix=".JPEG")
    images = root / "JPEGImages"
    (images / "b.JPEG").rename(images / "b.tga")
    (images / "c.JPEG").rename(images / "other.png")
    for key, name in (("a", ""), ("b", "b.tga"), ("c", "C:\\pictures\\other.png")):
        file = root / "Annotations" / f"{key}.xml"
        file.write_text(file.read_text().replace("<size>", f"<filename>{name}</filename><size>"))
    (root / "Annotations" / "a.xml").rename(root / "Annotations" / "a.XML")
    names = [os.path.basename(record["file_name"]) for record in load(entry())]
    assert names == ["a.JPEG", "b.tga", "other.png"]
    (images / "a.JPEG").rename(images / "a.JPG")
    (images / "a.png").write_bytes(b"")
    assert_fails(entry(), "several images 'a', ['a.JPG', 'a.png']", "none of them")
    file = root / "Annotations" / "a.XML"
    file.write_text(file.read_text().replace("<filename></filename>", "<filename>a.png</filename>"))
    assert load(entry())[0]["file_name"] == str(images / "a.png")


@pytest.mark.parametrize(
    "declared, written",
    [
        ("latin-1", "latin-1"),
        ("gb2312", "gb2312"),
        ("utf-16", "utf-8"),
        ("utf-16", "utf-16"),
        ("x-y", "utf-8"),
    ],
)
def test_xml_of_other_encodings(root, declared, written):
    label = "狗" if declared != "latin-1" else "chien né"
    write_voc(root, {"a": [(label, 11, 6, 30, 20)]})
    file = root / "Annotations" / "a.xml"
    text = f'<?xml version="1.0" encoding="{declared}"?>\n' + file.read_text()
    file.write_bytes(text.encode(written))
    assert len(load({**entry(), "CLASSES": [label]})[0]["annotations"]) == 1


def test_boxes_with_nan_are_told(root):
    write_voc(root, {"a": BOX, "b": [("dog", 1, 2, "nan", 4)]})
    assert_fails(entry(), "b.xml", "a box is", "nan")


@pytest.fixture
def flat(root):
    """Twenty images in folders of other names, without lists."""
    write_voc(root, {str(number): BOX for number in range(20)})
    (root / "Annotations").rename(root / "labels")
    (root / "JPEGImages").rename(root / "photos")
    return {"ANNOTATIONS": "pets/labels", "IMAGES": "pets/photos"}


def test_flat_folders(flat, root):
    one = entry(**flat)
    assert sorted(ids(one), key=int) == list(map(str, range(20)))
    check_dataset(one["NAME"], check_images=2, tested=True)
    (root / "val.txt").write_text("3\n5.jpg\n")
    assert ids(entry(**flat, SPLIT="pets/val.txt")) == ["3", "5"]
    assert_fails(entry(**flat, SPLIT="val"), "needs the file", "datasets/val", error=FileNotFoundError)
    for places in ({"ROOT": "pets", **flat}, {"ROOT": "pets"}, {"IMAGES": "pets"}, {}):
        wrong = {
            key: value
            for key, value in entry(**places).items()
            if places or key not in ("ROOT", "SPLIT")
        }
        assert_fails(wrong, "ROOT and SPLIT, or ANNOTATIONS and IMAGES")


def test_shares_are_disjoint_complete_and_independent_of_order(flat, monkeypatch):
    def share(start, stop, seed=1):
        return set(ids(entry(**flat, SPLIT={"FRACTION": [start, stop], "SEED": seed})))

    train, val, test = share(0, 0.65), share(0.65, 0.9), share(0.9, 1)
    assert [len(train), len(val), len(test)] == [13, 5, 2]
    assert train | val | test == set(map(str, range(20)))
    assert test == {"16", "4"}  # on any machine
    assert share(0, 0.65, seed=2) != train
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda *a, **k: ((p, d, f[::-1]) for p, d, f in walk(*a, **k)))
    assert share(0, 0.65) == train
    one = entry(**flat, SPLIT={"FRACTION": [0.65, 0.9], "SEED": 1})
    load(one)
    check_dataset(one["NAME"], tested=True)  # the evaluator's ids are the same


@pytest.mark.parametrize(
    "split, text",
    [
        ({"FRACTION": [0.8, 0.2]}, "the first one smaller"),
        ({"FRACTION": [0, 80]}, "from 0 to 1"),
        ({"FRACTION": 0.8}, "expected {FRACTION: [0.0, 0.8], SEED: 1}"),
        ({"FRACTION": [0, 0.8], "SEED": "a"}, "expected {FRACTION"),
        ({"FRACTION": [0, 0.8], "SEEDS": 1}, "expected {FRACTION"),
        ({}, "expected {FRACTION"),
        (["a"], "expected a string or {FRACTION"),
    ],
)
def test_wrong_splits_are_told(flat, split, text):
    assert_fails(entry(**flat, SPLIT=split), text, "SPLIT")


def test_records_whose_ids_the_evaluator_lacks_are_told(root):
    write_voc(root, {"000001": BOX, "000002": BOX})
    one = entry()
    register_custom_datasets([one])
    for start, changes, texts in (
        (1, {}, ["split lacks: ['1', '2'] (2 in all)", "a line of the split"]),
        (1, {"split": None}, ["metadata lacks ['split']"]),
    ):
        name = f"{one['NAME']}_{len(changes)}"
        dicts = [{**r, "image_id": start + i} for i, r in enumerate(DatasetCatalog.get(one["NAME"]))]
        DatasetCatalog.register(name, lambda dicts=dicts: dicts)
        metadata = MetadataCatalog.get(one["NAME"]).as_dict()
        wanted = ("evaluator_type", "thing_classes", "dirname", "split", "year")
        MetadataCatalog.get(name).set(**{key: {**metadata, **changes}[key] for key in wanted})
        with pytest.raises(ValueError) as caught:
            check_dataset(name, tested=True)
        assert all(text in str(caught.value) for text in texts), caught.value
