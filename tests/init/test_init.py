"""From a folder of data to configs that run."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from small_datasets import write_voc

from distill_d2 import cli
from distill_d2.engine import load_config
from distill_d2.init import trial
from distill_d2.init.anchors import fit_anchors
from distill_d2.init.backbones import PAIRS
from distill_d2.init.boxes import Boxes
from distill_d2.init.image_size import Budget, choose_size
from distill_d2.init.layout import find_layout
from distill_d2.testing import write_dataset

KEYS = ("ANNOTATIONS", "IMAGES", "ROOT", "SPLIT", "JSON", "LABELS")
SHARE = {"FRACTION": [0.0, 0.8], "SEED": 1}


def move(root, **places):
    """Move files of small_datasets.write_voc: {ending: folder}, "" beside the others."""
    files = [os.path.join(place, name) for place, _, names in os.walk(root) for name in names]
    for suffix, folder in places.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for file in files:
            if file.endswith(suffix):
                shutil.move(file, root / folder / os.path.basename(file))


def voc(root):
    write_voc(root, {f"a{i}": [("cat", 5, 5, 20, 25)] for i in range(4)})
    return root


def voc_layout(root):
    write_voc(voc(root), {"b": [("dog", 5, 5, 20, 25)]}, "val")
    return {"train": {"ROOT": "", "SPLIT": "train"}, "val": {"ROOT": "", "SPLIT": "val"}}


def voc_flat(root):
    """As published: annotations/ and images/, no split."""
    move(voc(root), xml="annots", jpg="pictures", txt="elsewhere")
    return {"train": {"ANNOTATIONS": "annots", "IMAGES": "pictures", "SPLIT": SHARE}}


def voc_beside(root):
    """Two folders, train and test, of xml files beside images of the same names."""
    for role in ("train", "test"):
        move(voc(root / role), xml="", jpg="", txt="../lists")
    return {
        "train": {"ANNOTATIONS": "train", "IMAGES": "train"},
        "val": {"ANNOTATIONS": "test", "IMAGES": "test"},
    }


def coco(root):
    for role in ("train", "val"):
        write_dataset(root / role)
        move(root / role, json=f"../annotations/{role}")
    return {
        role: {"JSON": f"annotations/{role}/{name}", "IMAGES": f"{role}/images"}
        for role in ("train", "val")
        for name in os.listdir(root / "annotations" / role)
    }


def coco_with_whole_paths(root):
    """One json, its images named by whole paths, and a link back to the folder."""
    entry = write_dataset(root)
    content = json.loads(Path(entry["JSON"]).read_text())
    for image in content["images"]:
        image["file_name"] = f"{entry['IMAGES']}/{image['file_name']}"
    Path(entry["JSON"]).write_text(json.dumps(content))
    (Path(entry["IMAGES"]) / "back").symlink_to(root)
    return {"train": {"JSON": Path(entry["JSON"]).name, "IMAGES": "", "SPLIT": SHARE}}


def write_yolo(root, images, labels, *names):
    shutil.move(voc(root / "voc") / "JPEGImages", root / images)
    shutil.rmtree(root / "voc")
    (root / labels).mkdir(parents=True)
    for file in (root / images).glob("*.jpg"):
        (root / labels / f"{file.stem}.txt").write_text("1 0.5 0.5 0.3 0.4\n0 0.4 0.4 0.3 0.4\n")
    for name in names:
        (root / name).write_text("cat\ndog\n")
    return root


def yolo(root):
    """As programs export it: train/images, train/labels, and paths that begin with ../"""
    for role in ("train", "valid"):
        write_yolo(root, f"{role}/images", f"{role}/labels")
    (root / "data.yaml").write_text("{train: ../train/images, val: ../valid/images, names: [cat, dog]}")
    return {"train": {"IMAGES": "train/images"}, "val": {"IMAGES": "valid/images"}}


def yolo_lists(root):
    write_yolo(root, "images", "labels")
    for role, names in {"train": "a0 a1 a2", "val": "a3"}.items():
        (root / f"{role}.txt").write_text("".join(f"./images/{name}.jpg\n" for name in names.split()))
    (root / "data.yaml").write_text("{train: train.txt, val: val.txt, names: {0: cat, 1: dog}}")
    return {role: {"IMAGES": "images", "SPLIT": f"{role}.txt"} for role in ("train", "val")}


def yolo_without_yaml(root):
    write_yolo(root, "photos", "truth", "classes.txt")
    return {"train": {"IMAGES": "photos", "LABELS": "truth", "SPLIT": SHARE}}


FORMS = [
    voc_layout,
    voc_flat,
    voc_beside,
    coco,
    coco_with_whole_paths,
    yolo,
    yolo_lists,
    yolo_without_yaml,
]


@pytest.mark.parametrize("write", FORMS)
def test_finds_the_form_of_a_folder(tmp_path, write):
    expected = write(tmp_path)
    layout = find_layout(str(tmp_path))
    assert layout.kind == write.__name__.partition("_")[0]
    for role, part in expected.items():
        (entry,) = getattr(layout, role)
        places = {key: entry[key] for key in KEYS if key in entry}
        is_path = {key: key != "SPLIT" or str(value).endswith(".txt") for key, value in part.items()}
        wanted = {key: str(tmp_path / value) if is_path[key] else value for key, value in part.items()}
        assert {key: os.path.normpath(v) if is_path[key] else v for key, v in places.items()} == wanted


def no_images(root):
    (root / "notes.csv").write_text("a")
    return "no dataset, but 1 files (1 .csv); expected one of"


def no_labels(root):
    move(voc(root), xml="../trash", jpg="images", txt="../trash")
    return "no dataset, but 4 files (4 .jpg)"


def two_datasets(root):
    voc_layout(root / "VOC2007")
    voc_layout(root / "VOC2012")
    return "several VOC datasets, in ['VOC2007/', 'VOC2012/']"


def two_jsons(root):
    coco(root)
    for name in ("x_train.json", "y_train.json"):
        (root / name).write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    return "3 COCO files for train"


def no_names(root):
    write_yolo(root, "images", "labels")
    return "nothing names their classes; add one of ['data.yaml'"


def no_training(root):
    move(voc(root / "val"), xml="", jpg="", txt="../lists")
    return "data for ['val'] and none for training"


UNCLEAR = [no_images, no_labels, two_datasets, two_jsons, no_names, no_training]


@pytest.mark.parametrize("write", UNCLEAR)
def test_says_what_is_unclear(tmp_path, write):
    message = write(tmp_path)
    with pytest.raises(ValueError) as caught:
        find_layout(str(tmp_path))
    assert message in str(caught.value)


def boxes(side, image=(640, 480), count=200):
    """Boxes about ``side`` pixels wide and half as high."""
    random = np.random.RandomState(0)
    low = random.uniform(0, 200, (count, 2))
    corners = np.concatenate(
        [low, low + np.array([1, 0.5]) * side * random.uniform(0.8, 1.3, (count, 1))], 1
    )
    return Boxes(np.array([image] * count, float), corners, np.arange(count), {})


@pytest.mark.parametrize(
    "images, output, message",
    [(4, "photos/out", "is inside the folder of images"), (2, "out", "of 2 images holds none of them")],
)
def test_refuses_what_cannot_be_trained(tmp_path, capsys, images, output, message):
    yolo_without_yaml(tmp_path)
    for file in sorted((tmp_path / "photos").iterdir())[images:]:
        file.unlink()
    with pytest.raises(SystemExit):
        cli.main(["init", str(tmp_path), "--output", str(tmp_path / output)])
    assert message in capsys.readouterr().err


def test_anchors_fit_and_small_objects_get_a_finer_pyramid():
    coarse, fine = (8, 16, 32), (4, 8, 16)
    large = fit_anchors(boxes(100).corners, [coarse, fine])
    assert large.strides == coarse and large.recall == 1 and large.fit > 0.7
    assert fit_anchors(boxes(100).corners, [coarse], usual=True).sizes[0][0] == 32
    small = fit_anchors(boxes(14).corners, [coarse, fine])
    assert small.strides == fine and small.recall > 0.9


def test_images_are_as_large_as_their_objects_need_and_the_budget_allows():
    assert choose_size(boxes(200), Budget(256, 512)) == (192, 256)
    assert choose_size(boxes(30), Budget(256, 512)) == (384, 512)
    assert choose_size(boxes(15, image=(320, 240)), Budget(256, 512)) == (256, 320)
    assert choose_size(boxes(15, image=(320, 240)), Budget(1333, 1333, least=800)) == (608, 800)


def test_configs_run_as_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trial, "_SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)
    write_yolo(tmp_path / "pets", "images", "labels", "classes.txt")
    assert cli.main(["init", "pets", "--device", "cpu", "--epochs", "2"]) == 0
    printed = capsys.readouterr().out
    assert "pets_train  yolo  3 images, 6 objects" in printed and "cat 3, dog 3" in printed
    commands = [
        line.split("#")[0].split()[1:] for line in printed.splitlines() if "--config-file" in line
    ]
    assert [words[0] for words in commands] == ["baseline", "train", "baseline"]
    for words in commands[:2]:
        assert cli.main(words) == 0
    assert (tmp_path / "distill" / "distilled" / "model_best.pth").exists()
    with pytest.raises(SystemExit):
        cli.main(["init", "pets"])
    assert "'distill' holds base.yaml, teacher.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("backbone", list(PAIRS))
def test_every_backbone_gives_configs(tmp_path, monkeypatch, backbone):
    """Their detectors are too large to try here."""
    monkeypatch.setattr(
        "distill_d2.init.proposing.try_out", lambda *_: trial.Trial(*[0.1] * 6, weight=1.0)
    )
    monkeypatch.setattr("distill_d2.init.proposing.can_be_had", lambda _: False)
    write_yolo(tmp_path / backbone, "images", "labels", "classes.txt")
    cli.main(
        ["init", str(tmp_path / backbone), "--backbone", backbone, "--output", str(tmp_path / "out")]
    )
    for name in ("teacher", "student", "distill"):
        cfg = load_config(str(tmp_path / "out" / f"{name}.yaml"))
        assert cfg.MODEL.RETINANET.NUM_CLASSES == 2
        levels = len(cfg.MODEL.RETINANET.IN_FEATURES)
        assert len(cfg.MODEL.ANCHOR_GENERATOR.SIZES) == levels
    assert cfg.MODEL.DISTILLER.MODEL_DISTILLER_CONFIG == str(tmp_path / "out" / "teacher.yaml")
