"""POTO in the Distiller: its view, and other detectors as teachers."""

import copy

import naive_poto as naive
import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage
from distill_d2.projects.poto import POTOView
from poto_case import computed, poto

from distill_d2.distiller import Distiller
from distill_d2.losses.gid import GID
from distill_d2.teacher import Teacher
from distill_d2.testing import no_synchronization, tiny_batch, tiny_detector
from distill_d2.views import Batch, build_view

LEVELS = ["p2", "p3", "p4"]
PADDED = (64, 80)  # of ``tiny_batch``


def observed(variant, inputs):
    """A recording teacher that saw them, and the model that it was made of."""
    model = poto(variant).eval()
    teacher = Teacher(copy.deepcopy(model))
    teacher.view.require("dense")
    teacher.view.taps.start()
    teacher.observe([item["image"] for item in inputs], PADDED)
    return teacher.view, model


def test_kind():
    view = build_view(poto(), "student")
    assert type(view) is POTOView and view.num_classes == 3 and view.anchor_levels == LEVELS
    assert view.strides == {"p2": 4, "p3": 8, "p4": 16}
    assert not view.has_centerness and not view.has_background
    with pytest.raises(TypeError, match="the student is a POTO, which has no rpn"):
        view.require("rpn")


@pytest.mark.parametrize("variant", ["plain", "3dmf"])
def test_dense(variant):
    """Of the teacher, whose head runs here; equal to what the detector itself reads."""
    inputs = tiny_batch(2)
    view, model = observed(variant, inputs)
    found, rows = view.dense(), computed(model, inputs)
    torch.testing.assert_close(found.logits, rows.filtered, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.deltas, rows.deltas, rtol=1e-3, atol=1e-3)
    assert torch.equal(found.anchors, rows.anchors) and found.level_sizes == rows.sizes
    assert not found.background and not found.centerness_levels
    for row in (0, 100, 415):
        expected = naive.decode(rows.deltas[1, row].tolist(), rows.anchors[row].tolist())
        np.testing.assert_allclose(found.boxes()[1, row], expected, rtol=1e-3, atol=1e-2)


def test_match():
    inputs = tiny_batch(3, objects=3)
    for item, count in zip(inputs, (3, 0, 1)):
        item["instances"] = item["instances"][:count]
    view, model = observed("plain", inputs)
    truth = Batch(inputs, PADDED, 0, 1).truth
    boxes, valid = truth.boxes, truth.valid
    predictions = view.dense()
    with no_synchronization():
        labels = predictions.match(boxes, valid)
    anchors = predictions.anchors.tolist()
    for item, found in zip(inputs, labels):
        some = item["instances"].gt_boxes.tensor.tolist()
        expected = [any(naive.is_near(box, anchor, 1.5) for box in some) for anchor in anchors]
        assert found.tolist() == [int(near) for near in expected] and found.any() == bool(some)
    assert labels.dtype == torch.int8
    assert not predictions.match(boxes, torch.zeros_like(valid)).any()


@pytest.mark.parametrize("student, teacher", [("plain", "3dmf"), ("3dmf", "plain"), ("plain", "FCOS")])
def test_other_teachers(student, teacher):
    """With and without the filter; locations and boxes of an FCOS are the same."""
    teacher = tiny_detector("fcos", channels=32) if teacher == "FCOS" else poto(teacher)
    model = Distiller(student=poto(student), teacher=Teacher(teacher), losses=[GID()]).train()
    with EventStorage(0):
        terms = model(tiny_batch(2))
    assert terms["loss_gid_response_cls"] > 0 and terms["loss_gid_response_reg"].isfinite()
