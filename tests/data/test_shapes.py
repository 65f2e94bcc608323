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
    content = json.loads(Path(small[0]).read_text())
    for annotation in content["annotations"]:
        corners = np.array(annotation["segmentation"][0]).reshape(-1, 2)
        box = [*corners.min(axis=0), *np.ptp(corners, axis=0)]
        assert np.allclose(box, annotation["bbox"], atol=0.02)
        assert corners.min() >= 0 and corners.max() <= 96
        # radius 10 to 25 % of 96 pixels; a square of radius r is at least 1.4 r wide
        assert 12 < max(box[2:]) <= 48.1
    assert [item["name"] for item in content["categories"]] == list(shapes.CLASSES)
    assert {item["category_id"] for item in content["annotations"]} == {1, 2, 3, 4, 5}


@pytest.fixture
def few(monkeypatch):
    """Splits so small that they take no time."""
    monkeypatch.setattr(shapes, "SPLITS", {"train": (6, 1), "val": (3, 2)})


def test_register_generates_on_first_use(few, monkeypatch, tmp_path):
    """Below the folder that the environment names last."""
    register_shapes()
    folder = tmp_path / "elsewhere" / "shapes"
    monkeypatch.setenv("DETECTRON2_DATASETS", str(folder.parent))
    register_shapes()
    register_shapes()
    assert not folder.exists()
    assert len(DatasetCatalog.get("shapes_train")) == 6
    assert (folder / "train" / "annotations.json").is_file() and not (folder / "val").exists()
    metadata = MetadataCatalog.get("shapes_val")
    assert metadata.evaluator_type == "coco" and metadata.thing_classes == list(shapes.CLASSES)
    assert metadata.image_root.startswith(str(folder))
    check_dataset("shapes_val", ("MODEL.RETINANET.NUM_CLASSES", 5), check_images=3)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_generation_that_fails_leaves_nothing(monkeypatch, tmp_path, error):
    drawn, draw = [], shapes.draw_image

    def stop(random, size):
        drawn.append(size)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw(random, size)

    with monkeypatch.context() as patch, pytest.raises(error):
        if error is KeyboardInterrupt:
            patch.setattr(shapes, "draw_image", stop)
        else:
            patch.setattr(shapes.cv2, "imwrite", lambda *_: False)  # what OpenCV says of a full disk
        generate_shapes(str(tmp_path), "train", 5, seed=1)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
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


def test_folder_with_other_content_is_not_taken_for_the_dataset(tmp_path):
    generate_shapes(str(tmp_path), "train", 2, seed=1)
    expected = "'num_images': 2.*expected.*'num_images': 3.*remove that folder"
    with pytest.raises(ValueError, match=expected):
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
    made, original = [], shapes._generate
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
    results = sorted(queue.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    assert results == [(0, 30, 30)] * 3 + [(1, 30, 30)]
