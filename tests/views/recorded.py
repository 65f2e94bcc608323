"""Detectors, and what their views recorded of one step."""

from __future__ import annotations

import contextlib

from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from distill_d2.testing.tiny import tiny_config, tiny_detector


def detector(family="retinanet"):
    """One whose predictions differ from row to row, which those of a new detector hardly do."""
    model = tiny_detector(family)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in _OUTPUT_LAYERS:
            nn.init.normal_(module.weight, std=0.1)
    return model


_OUTPUT_LAYERS = {"cls_score", "bbox_pred", "ctrness", "objectness_logits", "anchor_deltas"}


def detector_from_p3():
    """A RetinaNet whose neck does not read res2."""
    cfg = tiny_config()
    cfg.MODEL.SMALL_RESNET.OUT_FEATURES = ["res3", "res4"]
    cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p4"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32.0], [64.0]]
    return build_model(cfg)


def c4_config():
    """A Faster R-CNN without FPN: one level of stride 16, and res5 on each proposal."""
    cfg = tiny_config("faster")
    resnets = cfg.MODEL.RESNETS
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    resnets.OUT_FEATURES = ["res4"]
    resnets.STEM_OUT_CHANNELS = resnets.RES2_OUT_CHANNELS = 8
    resnets.WIDTH_PER_GROUP = 4
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16.0, 32.0, 64.0]]
    cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = ["res4"]
    cfg.MODEL.ROI_HEADS.NAME = "Res5ROIHeads"
    return cfg


@contextlib.contextmanager
def trained_on(view, batch):
    """One training forward of the student, recorded."""
    with view.recording(), EventStorage(0):
        view.model(batch)
        yield


def count_calls(module):
    """A list that grows by one with each forward of the module."""
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls
