"""SOLOv2 in the Distiller: its view, and the start from a teacher."""

import pytest
import torch
from detectron2.utils.events import EventStorage
from distill_d2.projects.solov2 import SOLOv2View
from solov2_case import batch, solov2

from distill_d2.views import build_view

NECK = ["p2", "p3", "p4", "p5", "p6"]


def test_kind():
    view = build_view(solov2(), "student")
    assert type(view) is SOLOv2View and view.num_classes == 3
    assert view.strides == {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
    assert view.anchor_levels == NECK and set(view.stage_shapes) >= {"res2", "res5"}
    for capability in ("dense", "rpn", "box_head", "score_boxes", "own_proposals"):
        with pytest.raises(TypeError, match=f"the student is a SOLOv2, which has no {capability}"):
            view.require(capability)


def test_levels_are_what_the_heads_read():
    model, inputs = solov2().train(), batch(2, 1)
    view, seen = build_view(model, "student"), []
    model.ins_head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with view.recording(), EventStorage(0):
        model(inputs)
        features = view.features
        assert list(features) == NECK
        for level, read in zip(features.values(), seen[0]):
            assert torch.equal(level, read) and level.requires_grad


def test_anchors_by_hand():
    """Squares of 8 strides around the center of each cell."""
    model = solov2().train()
    view = build_view(model, "student")
    with view.recording():
        model.backbone(torch.zeros(1, 3, 64, 128))
        anchors = view.anchors()
    assert list(anchors) == NECK
    for name, stride in view.strides.items():
        assert anchors[name].shape == (64 // stride, 128 // stride, 1, 4)
    assert anchors["p2"][0, 0, 0].tolist() == [2 - 16, 2 - 16, 2 + 16, 2 + 16]
    assert anchors["p4"][1, 3, 0].tolist() == [56 - 64, 24 - 64, 56 + 64, 24 + 64]
