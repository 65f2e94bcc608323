"""Trained detectors as files: what they find, what they say about themselves, and what is refused."""

import dataclasses
import json
import os

import cv2
import numpy as np
import onnx
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from distill_d2.cli import main
from distill_d2.export import FORMATS, export, export_graph, export_weights
from distill_d2.export.check import Differences, compare
from distill_d2.export.graph import graph_of
from distill_d2.export.inputs import prepare
from distill_d2.inference import Trained, load_trained
from distill_d2.plugins import detectors
from distill_d2.testing import tiny_batch, tiny_config
from distill_d2.testing.family import families

KINDS = [name for name, kind in detectors().items() if kind.family]


def command(*words):
    return main(["export", *map(str, words)])


def image_of(run):
    return cv2.imread(str(run.data / "images" / "0.png"))


def test_weights_are_a_run_of_their_own(run, tmp_path, capsys):
    command("--run", run.folder, "--output", tmp_path)
    path = tmp_path / f"{run.folder.name}.pth"
    assert path.stat().st_size < 0.6 * (run.folder / "model_final.pth").stat().st_size
    exported, trained = load_trained(str(path)), load_trained(str(run.folder))
    assert exported.classes == ["class0", "class1", "class2"]
    (found,), (expected,) = (each.predict([image_of(run)]) for each in (exported, trained))
    assert found.pred_boxes.tensor.equal(expected.pred_boxes.tensor)
    assert "needs distill_d2: build_small_resnet_backbone" in capsys.readouterr().out


def test_files_of_others_are_not_overwritten(tmp_path):
    """Those of an earlier export are."""
    config = tiny_config()
    trained = Trained(build_model(config).eval(), config, ["a", "b", "c"], "a run", None)
    for _ in range(2):
        export_weights(trained, str(tmp_path / "mine.pth"))
    for name in ("model_final.pth", "last_checkpoint", "config.yaml"):
        (tmp_path / name).write_text("text")
    for name in ("model_final", "config"):
        with pytest.raises(ValueError, match="name another file"):
            export_weights(trained, str(tmp_path / f"{name}.pth"))
    assert (tmp_path / "model_final.pth").read_text() == (tmp_path / "config.yaml").read_text() == "text"


def test_yaml_is_for_detectron2_alone(tmp_path, monkeypatch):
    config = tiny_config()
    config.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    config.MODEL.RESNETS.DEPTH = 18
    config.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    config.MODEL.RESNETS.OUT_FEATURES = config.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    config.MODEL.RETINANET.IN_FEATURES = ["p3", "p4", "p5"]
    config.DATASETS.CUSTOM = [{"NAME": "far_away", "FORMAT": "coco", "JSON": "/gone.json"}]
    config.MODEL.SMALL_RESNET.STEM_WIDTH = 16  # the default
    config.MODEL.SMALL_RESNET.WIDTHS = [16, 32, 64, 128]
    trained = Trained(build_model(config).eval(), config, ["a", "b", "c"], "a run", None)
    assert export_weights(trained, str(tmp_path / "small.pth")) == []
    monkeypatch.chdir(tmp_path)
    config = get_cfg()
    config.merge_from_file("small.yaml")
    weights = DefaultPredictor(config).model.state_dict()
    assert all(value.equal(weights[name]) for name, value in trained.model.state_dict().items())


def test_onnx_describes_itself(run, tmp_path, capsys):
    path = tmp_path / "student.onnx"
    command("--run", run.folder, "--output", path, "--images", run.data / "images")
    lines = capsys.readouterr().out
    assert "images of --images: 6 images, 18 detections, 0 not found again" in lines
    about = json.loads((tmp_path / "student.onnx.json").read_text())
    kept = {item.key: item.value for item in onnx.load(path).metadata_props}
    assert json.loads(kept["classes"]) == about["classes"] == ["class0", "class1", "class2"]
    assert json.loads(kept["input"]) == about["input"]
    assert about["input"]["shape"] == [3, 64, 96] and about["input"]["channels"] == "RGB"
    assert about["input"]["resize"] == {"rule": "stretch", "height": 64, "width": 96}
    assert len(os.listdir(tmp_path)) == 2


def test_a_size_is_filled_with_the_mean_color(run):
    trained = load_trained(str(run.folder))
    pixels = np.full((20, 40, 3), (10, 20, 30), np.uint8)
    tensor = prepare(trained, pixels, (64, 64))
    assert tensor.shape == (3, 64, 64)
    assert tensor[:, :32].flatten(1).T.unique(dim=0).tolist() == [[30.0, 20.0, 10.0]]  # RGB
    assert tensor[:, 32:].flatten(1).T.unique(dim=0).allclose(trained.model.pixel_mean.flatten())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "a.pth", "--format", "onnx"], "ends with .onnx"),
        (["--output", "a.onx"], "ends with .onx; expected a file that ends with one of .pth, .onnx"),
        (["--output", "a.onnx", "--format", "onnx", "--size", "480x"], "such as 480x640"),
        (["--output", "a.pt2", "--format", "torch-export", "--dynamic"], "takes one size"),
        (["--output", "a.pth", "--size", "64x64"], "weights have no size"),
        (["--output", "a.onnx", "--format", "onnx", "--dynamic"], "INPUT.FIXED_SIZE is [64, 96]"),
        (["--output", "a.pt", "--threshold", "5", "--format", "torchscript"], "from 0 to below 1"),
    ],
)
def test_wrong_arguments(run, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"distill-d2 export: --"):
        command("--run", run.folder, *words)
    assert message in capsys.readouterr().err and not os.listdir(tmp_path)


def test_a_file_that_differs_is_not_kept(run, tmp_path, monkeypatch):
    trained, kind = load_trained(str(run.folder)), FORMATS["torchscript"]
    halved = dataclasses.replace(kind, read=lambda *_: lambda image: [x[:1] for x in outputs(image)])
    monkeypatch.setitem(FORMATS, "torchscript", halved)
    outputs = graph_outputs(trained.model)
    with pytest.raises(
        ValueError, match=r"finds other objects than the model: 1 images, 3 detections, 2"
    ):
        export(trained, str(tmp_path / "a.pt"), "torchscript", [image_of(run)])
    assert not os.listdir(tmp_path)


def graph_outputs(model):
    def run(image):
        with torch.no_grad():
            return [output.numpy() for output in graph_of(model, image)(image)]

    return run


def test_equal_scores_come_in_any_order_and_classes_count():
    names = ["boxes", "scores", "classes", "masks"]
    boxes, masks = np.float32([[0, 0, 9, 9], [5, 5, 20, 20]]), np.zeros((2, 30, 30), bool)
    masks[:, :20] = True
    outputs = [boxes, np.float32([0.5, 0.5]), np.array([1, 2]), masks]
    differences = Differences()
    differences.add(names, outputs, [output[::-1] for output in outputs])
    assert differences.within_limits and differences.largest["boxes"] == 0
    differences.add(names, outputs, [*outputs[:2], np.array([1, 1]), masks])
    assert differences.lost == 1 and not differences.within_limits
    differences.add(names, outputs, [*outputs[:3], masks[:, ::-1]])
    assert differences.lost == 3


def set_threshold(model, value):
    """The score above which predictions are candidates."""
    if hasattr(model, "test_score_thresh"):
        model.test_score_thresh = value
    elif hasattr(model, "selection"):
        model.selection = dataclasses.replace(model.selection, score_threshold=value)
    elif hasattr(model.proposal_generator, "test_selection"):
        generator = model.proposal_generator
        generator.test_selection = dataclasses.replace(generator.test_selection, threshold=value)
    else:
        model.roi_heads.box_predictor.test_score_thresh = value


def keypoint_rcnn():
    config = tiny_config("mask")
    config.MODEL.MASK_ON, config.MODEL.KEYPOINT_ON = False, True
    config.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS = (16,)
    config.MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION = 7
    return build_model(config)


def check(name, format, path):
    """Record a detector on an image with objects; compare it there, on one of another size where the format takes
    any, and on one on which it has no candidates."""
    torch.manual_seed(0)
    model = (keypoint_rcnn() if name == "Keypoint R-CNN" else families()[name].build(8)).eval()
    batch = tiny_batch() if name == "Keypoint R-CNN" else families()[name].batch()
    image, other = (item["image"].float() for item in batch)
    graph = graph_of(model, image)
    run = export_graph(graph, image, path, format, dynamic=True)
    inputs = [image, image.flip(2)] + [other] * (format != "torch-export")
    differences = compare(graph.names, graph, run, inputs)
    assert differences.detections > 100 and differences.within_limits, str(differences)
    blank = torch.zeros_like(image) + model.pixel_mean
    low, high = 0.0, 1.0
    for _ in range(9):  # a threshold at which few are left
        middle = (low + high) / 2
        set_threshold(model, middle)
        low, high = (middle, high) if len(graph(image)[0]) > 6 else (low, middle)
    set_threshold(model, high)
    graph = graph_of(model, image)
    run = export_graph(graph, image, path, format, dynamic=True)
    assert compare(graph.names, graph, run, [image, blank]).lost == 0


def test_retinanet_in_onnx_of_any_size(tmp_path):
    check("RetinaNet", "onnx", str(tmp_path / "file"))


@pytest.mark.slow
@pytest.mark.parametrize("format", list(FORMATS))
@pytest.mark.parametrize("name", [*KINDS, "Keypoint R-CNN"])
def test_every_detector_in_every_format(name, format, tmp_path):
    if (name, format) == ("Keypoint R-CNN", "torch-export"):
        with pytest.raises(
            ValueError, match=r"a loop over the objects.*Try --format onnx or torchscript"
        ):
            check(name, format, str(tmp_path / "file"))
    else:
        check(name, format, str(tmp_path / "file"))
