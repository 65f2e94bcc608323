"""Pictures and a json of detections."""

import json

import cv2
import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from distill_d2.cli import main
from distill_d2.inference.images import find_images
from distill_d2.inference.pictures import panel
from distill_d2.inference.titles import titles_of


def test_two_runs_beside_the_truth(run, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    pixels = cv2.imread(str(run.data / "images" / "0.png"))
    cv2.imwrite(str(photos / "0.png"), pixels)
    cv2.imwrite(str(photos / "gray.png"), pixels[..., 0])
    cv2.imwrite(str(photos / "deep.png"), pixels[..., 0].astype(np.uint16) * 256)
    folder, output = str(run.folder), photos / "output"
    words = [str(photos), "--truth", str(run.data / "annotations.json"), "--output", str(output)]
    assert main(["predict", "--run", folder, "--run", folder, "--threshold", "0", *words]) == 1
    assert "deep.png' cannot be used: it has more than 8 bits" in capsys.readouterr().err
    assert {path.name for path in output.iterdir()} == {
        "0_detections.png",
        "gray_detections.png",
        "detections.json",
    }
    assert len(find_images([str(photos)], str(output))) == 3  # pictures are not taken for photos
    found = json.loads((output / "detections.json").read_text())
    (first, *_) = [item for item in found if item["file_name"].endswith("0.png")]
    (expected, *_) = [item for item in run.detections if item["image_id"] == 1]
    assert first["image_id"] == 1 and first["category_id"] == expected["category_id"]
    assert first["category_name"] == f"class{first['category_id'] - 1}"
    assert {item["run"] for item in found} == set(titles_of([folder, folder]))
    widths = [cv2.imread(str(output / f"{name}_detections.png")).shape[1] for name in ("0", "gray")]
    assert widths[0] > 1.3 * widths[1]  # a panel more, the truth


def test_nothing_that_is_an_image(run, tmp_path, capsys):
    assert exit_status("predict", "--run", run.folder, tmp_path, "--output", tmp_path / "out") == 2
    assert f"IMAGES: '{tmp_path}' holds no images" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def exit_status(*words):
    try:
        return main([str(word) for word in words])
    except SystemExit as stop:
        return stop.code


def test_masks_and_keypoints_of_a_small_image_are_drawn_large():
    found = Instances((20, 30))
    found.pred_boxes = Boxes(torch.tensor([[2.0, 4.0, 12.0, 14.0]]))
    found.pred_classes = torch.tensor([0])
    plain = panel("", np.zeros((20, 30, 3), np.uint8), found, ["cat"])
    assert plain.image.shape == (480, 720, 3) and not plain.image.any()
    (mark,) = plain.marks
    assert mark.box == [48.0, 96.0, 288.0, 336.0] and mark.label == "cat"
    found.pred_masks = torch.zeros(1, 20, 30, dtype=torch.bool)
    found.pred_masks[:, 4:14, 2:12] = True
    colored = panel("", np.zeros((20, 30, 3), np.uint8), found, ["cat"]).image.any(axis=2)
    assert colored[100:330, 60:280].all() and not colored[350:].any()
    found.remove("pred_masks")
    found.pred_keypoints = torch.tensor([[[20.0, 10.0, 1.0]]])
    colored = panel("", np.zeros((20, 30, 3), np.uint8), found, ["cat"]).image.any(axis=2)
    assert colored[240, 480] and colored.sum() < 200


def test_titles_are_as_short_as_they_are_different():
    assert titles_of(["output/teacher", "output/pkd/"]) == ["teacher", "pkd"]
    assert titles_of(["a/pkd", "b/pkd"]) == ["a/pkd", "b/pkd"]
    assert titles_of(["a", "a"]) == ["a", "a (2)"]
