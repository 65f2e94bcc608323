"""DATASETS.SKIP_UNREADABLE."""

import json
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from runs import Job, checkpoint
from small_datasets import write_voc

from distill_d2.data import register_custom_datasets, skip_unreadable
from distill_d2.data.voc import check_evaluated_ids
from distill_d2.evaluation.ground_truth import with_ground_truth
from distill_d2.testing import write_dataset


def test_run_without_the_images_that_cannot_be_read(tmp_path):
    job = Job(tmp_path)
    truncated, missing, *_ = sorted(Path(job.entry["IMAGES"]).iterdir())
    truncated.write_bytes(truncated.read_bytes()[:200])
    missing.unlink()
    job.config.DATASETS.SKIP_UNREADABLE = True
    job.run(opts=["SOLVER.EPOCHS", 1, "SOLVER.STEPS", "()"])
    listed = (job.output / "unreadable_images.txt").read_text()
    assert str(truncated) in listed and str(missing) in listed and listed.count("\n") == 2
    assert len(DatasetCatalog.get(job.config.DATASETS.TRAIN[0])) == 4
    assert (
        checkpoint(job.output)["trainer"]["iteration"] == 1
    )  # two batches of two are an epoch of the rest


def test_evaluation_without_them_too(tmp_path):
    write_voc(tmp_path / "voc", {"a": [("cat", 5, 5, 20, 20)], "b": [("cat", 5, 5, 20, 20)]})
    voc = {"NAME": "unreadable_voc", "FORMAT": "voc", "ROOT": str(tmp_path / "voc"), "SPLIT": "train"}
    entries = [{**voc, "CLASSES": ["cat"]}, {**write_dataset(tmp_path), "NAME": "unreadable_coco"}]
    register_custom_datasets(entries)
    (tmp_path / "voc" / "JPEGImages" / "b.jpg").write_bytes(b"no image")
    next(Path(entries[1]["IMAGES"]).iterdir()).unlink()
    skip_unreadable([entry["NAME"] for entry in entries], str(tmp_path))
    check_evaluated_ids("unreadable_voc", ["a"])
    described = with_ground_truth("unreadable_coco", str(tmp_path / "truth"))
    truth = json.loads(Path(MetadataCatalog.get(described).json_file).read_text())
    assert len(truth["images"]) == 5 and len(truth["annotations"]) == 10


def test_sizes_that_are_read_from_images(tmp_path):
    images, labels = Path(write_dataset(tmp_path / "data")["IMAGES"]), tmp_path / "labels"
    labels.mkdir()
    broken, *rest = sorted(images.iterdir())
    for file in (broken, *rest):
        (labels / f"{file.stem}.txt").write_text("0 0.5 0.5 0.2 0.2")
    broken.write_bytes(b"no image")
    yolo = {"FORMAT": "yolo", "IMAGES": str(images), "LABELS": str(labels), "CLASSES": ["a"]}
    names = ["unreadable_yolo", "unreadable_images"]
    register_custom_datasets(
        [{**yolo, "NAME": names[0]}, {"FORMAT": "images", "IMAGES": str(images), "NAME": names[1]}]
    )
    for name in names:
        with pytest.raises(ValueError, match=f"{broken.name}.*SKIP_UNREADABLE"):
            DatasetCatalog.get(name)
    skip_unreadable(names, str(tmp_path))
    assert [len(DatasetCatalog.get(name)) for name in names] == [len(rest)] * 2
