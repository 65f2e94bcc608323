"""datasets/make_voc_animals.py: photos of VOC in COCO's form."""

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image
from small_datasets import write_voc

FILE = Path(__file__).resolve().parents[2] / "datasets" / "make_voc_animals.py"


def test_makes_splits_and_small_photos(tmp_path):
    """Images of 60x40 become 256x171; corners count from 0. Others than animals are left out."""
    spec = importlib.util.spec_from_file_location("make_voc_animals", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    images = {f"2007_{i:06}": [("cow", 1, 11, 60, 40), ("car", 1, 1, 9, 9)] for i in range(5)}
    write_voc(tmp_path / "voc", {**images, "2007_000009": [("car", 1, 1, 9, 9)]})
    module.make(tmp_path / "voc", tmp_path / "out", train=2, val=1)

    splits = {
        split: json.loads((tmp_path / "out" / "annotations" / f"{split}.json").read_text())
        for split in ("train", "val", "test")
    }
    names = [image["file_name"][:-4] for content in splits.values() for image in content["images"]]
    assert sorted(names) == sorted(images) and names != sorted(names)
    assert [len(content["images"]) for content in splits.values()] == [2, 1, 2]
    (item,) = splits["val"]["annotations"]
    assert item["bbox"] == pytest.approx([0, 10 * 171 / 40, 256, 30 * 171 / 40])
    assert splits["val"]["categories"][item["category_id"] - 1]["name"] == "cow"
    assert Image.open(tmp_path / "out" / "images" / f"{names[0]}.jpg").size == (256, 171)
