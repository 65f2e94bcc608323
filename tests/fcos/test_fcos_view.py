"""FCOS' view, and FCOS beside other detectors."""

import naive_fcos as naive
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from distill_d2.projects.fcos import OneStageDetectorView
from distill_d2.projects.fcos.tiny import config
from fcos_case import STRIDES, fcos
from recorded import detector

from distill_d2 import Distiller, Teacher
from distill_d2.losses import GID
from distill_d2.testing import no_synchronization, tiny_batch
from distill_d2.views import Batch, build_view, require_same_boxes

PADDED = (64, 80)  # of ``tiny_batch``


def observed(images):
    """The view of a teacher that saw the images, and its model as it was loaded."""
    model = fcos(NORM="BN")
    for name, tensor in model.state_dict().items():  # norms that change what they read
        if "running" in name:
            tensor.uniform_(0.5, 1.5)
    teacher = Teacher(model)
    for capability in ("dense", "anchors"):
        teacher.view.require(capability)
    teacher.view.taps.start()
    teacher.observe([image.float() for image in images], PADDED)
    return teacher.view, model.eval()


def test_kind():
    view = build_view(fcos(), "student")
    assert type(view) is OneStageDetectorView and view.num_classes == 3
    assert view.has_centerness and not view.has_background
    assert view.offers == ("dense", "anchors") and view.anchor_levels == ["p2", "p3", "p4"]
    assert {"p2": 4, "p3": 8, "p4": 16}.items() <= view.strides.items()


def test_of_other_proposal_generators_the_features_only():
    cfg = config(8)
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "RPN"
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[8], [16], [32]]
    view = build_view(build_model(cfg), "teacher")
    assert view.offers == () and view.num_classes is None
    assert view.require_level("p3").stride == 8


def test_dense():
    """The teacher's, with folded norms; boxes are those of the detections."""
    images = [item["image"] for item in tiny_batch()]
    view, model = observed(images)
    found = view.dense()
    with torch.no_grad():
        x = torch.zeros(2, 3, *PADDED)
        for canvas, image in zip(x, images):
            canvas[:, : image.shape[1], : image.shape[2]] = (image - model.pixel_mean) / model.pixel_std
        levels = [model.backbone(x)[name] for name in ("p2", "p3", "p4")]
        outputs = model.proposal_generator.fcos_head(levels)
    centerness = torch.cat([level.flatten(1, 2) for level in found.centerness_levels], dim=1)
    for actual, expected in zip((found.logits, found.deltas, centerness), outputs):
        rows = torch.cat([level.flatten(2).transpose(1, 2) for level in expected], dim=1)
        torch.testing.assert_close(actual, rows, rtol=1e-3, atol=1e-3)
    assert found.level_sizes == [320, 80, 20] and not found.background and found.num_classes == 3
    boxes, row = found.boxes(), 320 + 3 * 10 + 5  # on p3: x 5, y 3
    x, y = 5 * 8 + 4, 3 * 8 + 4
    left, top, right, bottom = (8 * found.deltas[1, row]).tolist()
    np.testing.assert_allclose(boxes[1, row], [x - left, y - top, x + right, y + bottom], rtol=1e-5)
    assert found.anchors[row].tolist() == [x - 4, y - 4, x + 4, y + 4]
    positive = (found.deltas > 0).all(-1)
    back = found.encode(boxes, found.anchors.expand_as(boxes))
    torch.testing.assert_close(back[positive], found.deltas[positive], rtol=1e-3, atol=1e-3)


def test_the_head_of_the_student_runs_once():
    model, calls = fcos().train(), []
    view = build_view(model, "student")
    view.require("dense")
    model.proposal_generator.fcos_head.register_forward_hook(lambda *call: calls.append(call[2]))
    with view.recording(), EventStorage(0):
        model(tiny_batch())
        found = view.dense()
    assert len(calls) == 1 and found.logits.requires_grad


def test_anchors_are_squares_of_eight_strides():
    view, _ = observed([tiny_batch()[0]["image"]])
    anchors = view.anchors()
    shapes = {name: tuple(level.shape) for name, level in anchors.items()}
    assert shapes == {"p2": (16, 20, 1, 4), "p3": (8, 10, 1, 4), "p4": (4, 5, 1, 4)}
    x, y = 5 * 8 + 4, 2 * 8 + 4
    assert anchors["p3"][2, 5, 0].tolist() == [x - 32, y - 32, x + 32, y + 32]


def test_match_and_assign_are_the_detectors_own():
    inputs = [*tiny_batch(1, objects=5), *tiny_batch(1, objects=0), *tiny_batch(1, objects=2)]
    view, model = observed([item["image"] for item in inputs])
    truth = Batch(inputs, PADDED, 0, 1).truth
    predictions = view.dense()
    with no_synchronization():
        labels = predictions.match(truth.boxes, truth.valid)
        index = predictions.assign(truth.boxes, truth.valid)
    fcos_ = model.proposal_generator
    levels = [view.level(name) for name in ("p2", "p3", "p4")]
    gt = [item["instances"] for item in inputs]
    _, targets = fcos_.targets(fcos_.anchor_generator(levels), gt)
    assert labels.dtype == torch.int8 and torch.equal(labels == 1, targets.positive)
    assert not (labels < 0).any() and labels.any(dim=1).tolist() == [True, False, True]
    assert torch.equal(index[targets.positive], targets.objects[targets.positive])
    points = [
        (x, y, stride, level)
        for level, stride in enumerate(STRIDES)
        for x, y in naive.locations(64 // stride, 80 // stride, stride)
    ]
    bounds = [(-1, 16), (16, 32), (32, 1e8)]
    expected = naive.assign(points, gt[0].gt_boxes.tensor.tolist(), bounds, 1.5)
    assert labels[0].bool().tolist() == [found is not None for found in expected]


def test_rows_pair_with_those_of_detectron2s_own():
    first, second, wide = (
        build_view(model, "student") for model in (fcos(), detector("fcos"), fcos(width=16))
    )
    require_same_boxes(first, second, "dense", "KD")
    require_same_boxes(second, wide, "dense", "KD")
    with pytest.raises(ValueError, match="their anchors differ"):
        require_same_boxes(first, build_view(detector("retinanet"), "teacher"), "dense", "KD")


def test_detectron2s_own_as_a_teacher():
    model = Distiller(student=fcos(), teacher=Teacher(detector("fcos")), losses=[GID()]).train()
    terms = model(tiny_batch())
    assert len(terms) == 3 + 4 and all(term.isfinite() and term > 0 for term in terms.values())
