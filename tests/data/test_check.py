"""What is checked before training starts."""

import itertools
import json
import os
import pickle

import pytest
from detectron2.data import DatasetCatalog, DatasetMapper

from distill_d2.data import NamedReadErrors, check_datasets, register_custom_datasets
from distill_d2.plugins import detectors, of_student
from distill_d2.testing.tiny import CLASSES, distiller_config, tiny_config, use_dataset, write_dataset

_numbers = itertools.count()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def cfg(folder):
    """A config whose dataset of six images is registered."""
    cfg = tiny_config()
    entry = write_dataset(folder)
    entry["NAME"] += f"_{next(_numbers)}"
    use_dataset(cfg, entry)
    register_custom_datasets([entry])
    return cfg


def name_of(cfg):
    return cfg.DATASETS.TRAIN[0]


def assert_fails(cfg, *texts, error=ValueError, **arguments):
    with pytest.raises(error) as caught:
        check_datasets(cfg, **arguments)
    assert all(text in str(caught.value) for text in texts), caught.value


def test_nothing_to_train_on(cfg):
    check_datasets(cfg)
    cfg.DATASETS.TRAIN = ()
    assert_fails(cfg, "DATASETS.TRAIN is empty")
    check_datasets(cfg, train=False)


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
def test_unknown_name_lists_close_and_custom_ones(cfg, key):
    setattr(cfg.DATASETS, key, ("coco_2017_trian",))
    assert_fails(cfg, f"DATASETS.{key} names 'coco_2017_trian'", "'coco_2017_train'")
    name = cfg.DATASETS.CUSTOM[0]["NAME"]
    assert_fails(cfg, name, "DATASETS.CUSTOM")


def test_each_dataset_is_read_once_and_after_all_names_are_checked(cfg, monkeypatch):
    read, get = [], DatasetCatalog.get
    monkeypatch.setattr(DatasetCatalog, "get", lambda name: read.append(name) or get(name))
    tested, cfg.DATASETS.TEST = cfg.DATASETS.TEST, ("no_such_dataset",)
    assert_fails(cfg, "no_such_dataset")
    assert read == []
    cfg.DATASETS.TEST = tested
    check_datasets(cfg)
    assert read == [name_of(cfg)]  # it is in both lists


def test_missing_annotations(cfg, folder, tmp_path):
    (folder / "annotations.json").unlink()
    (tmp_path / "datasets" / "coco").mkdir(parents=True)
    texts = [name_of(cfg), "annotations.json", "['coco']", "distill-d2 init"]
    assert_fails(cfg, *texts, error=FileNotFoundError)


@pytest.mark.parametrize("name", [n for n, each in detectors().items() if each.num_classes_key])
@pytest.mark.parametrize("distill", [False, True])
def test_number_of_classes(cfg, name, distill):
    detector = detectors()[name]
    other = detector.load_family().config(8)
    other.DATASETS = cfg.DATASETS.clone()
    if distill:
        other = distiller_config(other, "teacher.yaml")
    check_datasets(other)
    other.merge_from_list([detector.num_classes_key, 80])
    assert_fails(other, f"{detector.num_classes_key} is 80", f"has {CLASSES} classes", "class0")
    assert_fails(other, f"{detector.num_classes_key} is 80", train=False)
    node = other.MODEL.DISTILLER if distill else other.MODEL
    setattr(node, "STUDENT_META_ARCH" if distill else "META_ARCHITECTURE", "NobodyKnowsIt")
    check_datasets(other)


def test_an_ssds_size_of_images(cfg):
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.SSD.NUM_CLASSES = "SSD", CLASSES
    for config in (cfg, distiller_config(cfg, "")):
        (detector,) = of_student(config)
        config.INPUT.FIXED_SIZE = [300, 300]
        detector.check(config)
        for size in ([], [300, 320]):
            config.INPUT.FIXED_SIZE = size
            with pytest.raises(ValueError, match="an SSD takes images of 300x300 pixels"):
                detector.check(config)


def test_annotations_are_needed_for_training_alone(cfg):
    dicts = [{**record, "annotations": []} for record in DatasetCatalog.get(name_of(cfg))]
    name = f"check_registered_{next(_numbers)}"
    DatasetCatalog.register(name, lambda: dicts)
    cfg.DATASETS.TEST = (name,)
    check_datasets(cfg)
    cfg.DATASETS.TRAIN = (name,)
    assert_fails(cfg, name, "no annotations", "6 images")


@pytest.fixture
def images_alone(cfg, folder):
    """``cfg`` in a Distiller, to train on the images of its dataset without their annotations."""
    name = f"check_images_{next(_numbers)}"
    register_custom_datasets([{"NAME": name, "FORMAT": "images", "IMAGES": str(folder / "images")}])
    cfg = distiller_config(cfg, "teacher.yaml")
    cfg.DATASETS.TRAIN = (name,)
    cfg.MODEL.DISTILLER.TASK_LOSS_WEIGHT = 0.0
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    return cfg


def test_distillation_alone_needs_no_annotations(images_alone):
    """But the student's own losses do, and where images without are dropped, and without distillation."""
    check_datasets(images_alone)
    images_alone.DATASETS.TEST = images_alone.DATASETS.TRAIN
    check_datasets(images_alone)
    keys = ["train_distill.py", "MODEL.DISTILLER.TASK_LOSS_WEIGHT 0", "FILTER_EMPTY_ANNOTATIONS False"]
    for change in (
        ["MODEL.DISTILLER.TASK_LOSS_WEIGHT", 0.01],
        ["DATALOADER.FILTER_EMPTY_ANNOTATIONS", True],
        ["MODEL.META_ARCHITECTURE", "RetinaNet"],
    ):
        cfg = images_alone.clone()
        cfg.merge_from_list(change)
        assert_fails(cfg, name_of(cfg), "no annotations: 6 images", *keys)
        check_datasets(cfg, train=False)


def test_missing_images_are_counted_and_named(cfg, folder):
    for number in (2, 4):
        (folder / "images" / f"{number}.png").unlink()
    assert_fails(cfg, "2 of 6 images", "2.png", "4 files", error=FileNotFoundError)


def test_existence_costs_one_listing_per_folder(cfg, folder, monkeypatch):
    listed, listdir = [], os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(str(path)) or listdir(path))
    monkeypatch.setattr(os.path, "exists", lambda path: pytest.fail("one call per file"))
    cfg.DATASETS.CHECK_IMAGES = 0
    check_datasets(cfg)
    assert listed == [str(folder / "images")]


def test_unusable_image_is_named(cfg, images_alone, folder):
    good, broken = (folder / "images" / f"{number}.png" for number in (2, 3))
    content = broken.read_bytes()
    for wrong, text in (
        (b"", ""),
        (b"not an image", ""),
        (content[:-2000], ""),
        (good.read_bytes(), "48"),
    ):
        broken.write_bytes(wrong)
        assert_fails(cfg, "images/3.png' cannot be used", text)
        if not text:
            assert_fails(images_alone, "images/3.png' cannot be used")


def test_how_many_images_are_decoded(cfg, folder):
    for image in (folder / "images").iterdir():
        image.write_bytes(b"not an image")
    cfg.DATASETS.CHECK_IMAGES = 1
    assert_fails(cfg, "cannot be used")
    cfg.DATASETS.CHECK_IMAGES = 0
    check_datasets(cfg)
    cfg.DATASETS.CHECK_IMAGES = -1
    assert_fails(cfg, "DATASETS.CHECK_IMAGES is -1")


# NamedReadErrors


def test_mapper_errors_name_the_image(cfg, folder):
    (folder / "images" / "3.png").write_bytes(b"not an image")
    mapper = NamedReadErrors(DatasetMapper(cfg, True))
    good, bad = (DatasetCatalog.get(name_of(cfg))[index] for index in (2, 3))
    assert mapper(good)["image"].shape[0] == 3
    with pytest.raises(ValueError, match="images/3.png.*UnidentifiedImageError"):
        mapper(bad)


def test_error_crosses_processes():
    def fail(record):
        raise json.JSONDecodeError("two arguments", "more", 0)  # a type that workers cannot rebuild

    with pytest.raises(ValueError) as caught:
        NamedReadErrors(fail)({"file_name": "a.png"})
    assert "a.png" in str(pickle.loads(pickle.dumps(caught.value)))
