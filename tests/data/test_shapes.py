"""The generated dataset."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from pycocotools.coco import COCO

from distill_d2.data import check_dataset, generate_shapes, register_shapes, shapes


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Paths of the annotations and images of 40 images."""
    root = str(tmp_path_factory.mktemp("shapes"))
    json_file, images = generate_shapes(root, "small", 40, seed=5)
    return json_file, Path(images)


def _pixels(folder):
    return {file.name: cv2.imread(str(file)) for file in Path(folder).iterdir()}


def test_same_arguments_give_the_same_bytes(small, tmp_path):
    json_file, images = generate_shapes(str(tmp_path), "other_name", 40, seed=5)
    _, others = generate_shapes(str(tmp_path), "other_seed", 1, seed=6, image_size=128)
    assert _pixels(others)["00000.jpg"].shape == (128, 128, 3)
    assert Path(json_file).read_bytes() == Path(small[0]).read_bytes()
    first, second = _pixels(small[1]), _pixels(images)
    assert first.keys() == second.keys() and len(first) == 40
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_masks_are_where_the_shapes_are(small):
    """Each polygon covers the pixels that are nearer to its color than to the background's."""
    coco, overlaps = COCO(small[0]), []
    for image in coco.loadImgs(coco.getImgIds()):
        pixels = cv2.imread(str(small[1] / image["file_name"])).astype(float)
        annotations = coco.imgToAnns[image["id"]]
        assert 1 <= len(annotations) <= 4 and image["width"] == pixels.shape[1]
        assert sum(map(coco.annToMask, annotations)).max() == 1  # shapes do not overlap
        masks = [coco.annToMask(annotation).astype(bool) for annotation in annotations]
        background = np.median(pixels[~np.logical_or.reduce(masks)], axis=0)
        for index, mask in enumerate(masks):
            color = np.median(pixels[mask], axis=0)
            assert np.abs(color - background).sum() > 130  # 160 before JPEG, from the mean
            near = np.abs(pixels - color).sum(axis=2) < np.abs(pixels - background).sum(axis=2)
            around = cv2.dilate(mask.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
            others = np.logical_or.reduce([np.zeros_like(mask), *masks[:index], *masks[index + 1 :]])
            near &= around & ~others
            overlaps.append((near & mask).sum() / (near | mask).sum())
    assert np.mean(overlaps) > 0.93 and min(overlaps) > 0.7


def test_boxes_enclose_their_polygons_within_the_image(small):
    for annotation in json.loads(Path(small[0]).read_text())["annotations"]:
        corners = np.array(annotation["segmentation"][0]).reshape(-1, 2)
        x, y, width, height = annotation["bbox"]
        assert np.allclose(
            [*corners.min(axis=0), *np.ptp(corners, axis=0)], [x, y, width, height], atol=0.02
        )
        assert corners.min() >= 0 and corners.max() <= 96
        # radius 10 to 25 % of 96 pixels; a square of radius r is at least 1.4 r wide
        assert 12 < max(width, height) <= 48.1


def test_all_classes_occur_and_in_the_order_of_the_metadata(small):
    content = json.loads(Path(small[0]).read_text())
    assert [item["name"] for item in content["categories"]] == list(shapes.CLASSES)
    assert {item["category_id"] for item in content["annotations"]} == {1, 2, 3, 4, 5}


@pytest.fixture
def few(monkeypatch):
    """Splits so small that they take no time."""
    monkeypatch.setattr(shapes, "SPLITS", {"train": (6, 1), "val": (3, 2)})


def test_register_generates_on_first_use(few, tmp_path):
    register_shapes()
    register_shapes()
    folder = tmp_path / "datasets" / "shapes"
    assert not folder.exists()
    assert len(DatasetCatalog.get("shapes_train")) == 6
    assert (folder / "train").is_dir() and not (folder / "val").exists()
    metadata = MetadataCatalog.get("shapes_val")
    assert metadata.evaluator_type == "coco" and metadata.thing_classes == list(shapes.CLASSES)
    check_dataset("shapes_val", ("MODEL.RETINANET.NUM_CLASSES", 5), check_images=3)


def test_register_follows_the_environment(few, monkeypatch, tmp_path):
    register_shapes()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "elsewhere"))
    register_shapes()
    DatasetCatalog.get("shapes_val")
    assert (tmp_path / "elsewhere" / "shapes" / "val" / "annotations.json").is_file()
    assert MetadataCatalog.get("shapes_val").image_root.startswith(str(tmp_path / "elsewhere"))


def test_interrupted_generation_leaves_nothing(monkeypatch, tmp_path):
    drawn = []

    def stop(random, size):
        drawn.append(size)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw(random, size)

    draw = shapes.draw_image
    monkeypatch.setattr(shapes, "draw_image", stop)
    with pytest.raises(KeyboardInterrupt):
        generate_shapes(str(tmp_path), "train", 5, seed=1)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    monkeypatch.setattr(shapes, "draw_image", draw)
    assert len(_pixels(generate_shapes(str(tmp_path), "train", 5, seed=1)[1])) == 5


def test_killed_generation_is_started_again_and_its_remains_removed(tmp_path):
    job = multiprocessing.get_context("fork").Process(
        target=generate_shapes, args=(str(tmp_path), "train", 10**6, 1)
    )
    job.start()
    while not list(tmp_path.glob(".*/images/*.jpg")):
        time.sleep(0.01)
    job.kill()
    job.join()
    (remains,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert remains.name != "train"
    assert len(_pixels(generate_shapes(str(tmp_path), "train", 2, seed=1)[1])) == 2
    assert not remains.exists()


def test_image_that_cannot_be_written_stops_the_generation(monkeypatch, tmp_path):
    monkeypatch.setattr(shapes.cv2, "imwrite", lambda *_: False)  # what OpenCV says of a full disk
    with pytest.raises(OSError, match="cannot write"):
        generate_shapes(str(tmp_path), "train", 2, seed=1)
    assert not (tmp_path / "train").exists()


def test_folder_with_other_content_is_not_taken_for_the_dataset(tmp_path):
    generate_shapes(str(tmp_path), "train", 2, seed=1)
    with pytest.raises(
        ValueError, match="'num_images': 2.*expected.*'num_images': 3.*remove that folder"
    ):
        generate_shapes(str(tmp_path), "train", 3, seed=1)
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match="holds no shapes dataset"):
        generate_shapes(str(tmp_path), "val", 3, seed=1)


def test_unwritable_folder_is_named(few, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "file"))
    register_shapes()
    with pytest.raises(OSError, match=r"file/shapes'.*DETECTRON2_DATASETS"):
        DatasetCatalog.get("shapes_val")


def _generate(root, barrier, queue):
    made = []
    original = shapes._generate
    shapes._generate = lambda *arguments: (made.append(1), original(*arguments))
    barrier.wait()
    json_file, images = generate_shapes(root, "train", 30, seed=1)
    queue.put(
        (len(made), len(json.loads(Path(json_file).read_text())["images"]), len(os.listdir(images)))
    )


def test_processes_that_start_together_generate_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(4), context.Queue()
    workers = [context.Process(target=_generate, args=(str(tmp_path), barrier, queue)) for _ in range(4)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert sum(made for made, _, _ in results) == 1
    assert {seen for _, *seen in map(tuple, results) for seen in [tuple(seen)]} == {(30, 30)}
