"""Fixtures of AdelaiDet's FCOS: a small model's levels, head, detections, targets, losses, gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from torch import nn

from distill_d2.projects.fcos.losses import centerness_of, smoothed_ious

from . import Fixture, FixtureError, golden_kind
from .adet import (
    compare_instances,
    compare_training,
    filled,
    image_names,
    inputs_of,
    objects_of,
    per_level,
    shapes_of,
    small_config,
)

_CONFIG = "FCOS-Detection/R_50_1x.yaml"
_EVALUATIONS = {
    "default": [],
    "thresh_with_ctr": ["THRESH_WITH_CTR", True],
    "topk50_post20_nms05": ["PRE_NMS_TOPK_TEST", 50, "POST_NMS_TOPK_TEST", 20, "NMS_TH", 0.5],
}
_TRAININGS = {
    "default": [],
    "iou_quality": ["BOX_QUALITY", "iou"],
    "moving_fg": ["LOSS_NORMALIZER_CLS", "moving_fg"],
    "norm_all": ["LOSS_NORMALIZER_CLS", "all"],
    "loc_iou": ["LOC_LOSS_TYPE", "iou"],
    "loc_linear_iou": ["LOC_LOSS_TYPE", "linear_iou"],
    "no_center_sample": ["CENTER_SAMPLE", False],
    "radius0p5": ["POS_RADIUS", 0.5],
    "empty_img1": [],
    "empty_all": [],
}
# Images without objects, by training.
_EMPTY = {"empty_img1": ("1",), "empty_all": None}


@golden_kind(
    holds=["keys", "image0", "eval/head/logits0", "train/*/loss_fcos_cls", "targets/*/labels0"],
    rtol=0,
    atol=1e-4,
)
def adet_fcos(fixture: Fixture) -> None:
    model = _model(fixture, [])
    _compare_network(fixture, model)
    for name in _variants(fixture, "eval/*/img0/scores", _EVALUATIONS):
        variant, folder = _model(fixture, _EVALUATIONS[name]), f"eval/{name}"
        with torch.no_grad():
            outputs = variant(inputs_of(fixture, folder))
        for image, output in zip(image_names(fixture), outputs):
            compare_instances(fixture, f"{folder}/img{image}", output["instances"])
    for name in _variants(fixture, "train/*/loss_fcos_cls", _TRAININGS):
        empty = image_names(fixture) if _EMPTY.get(name, ()) is None else _EMPTY.get(name, ())
        variant = _model(fixture, _TRAININGS[name])
        compare_training(fixture, f"train/{name}", variant, _labeled(fixture, empty))
    for name in _variants(fixture, "targets/*/labels0", _TRAININGS):
        _compare_targets(fixture, f"targets/{name}", _model(fixture, _TRAININGS[name]))
    _compare_functions(fixture)


def _variants(fixture: Fixture, pattern: str, known: dict[str, list[Any]]) -> list[str]:
    names = [name.split("/")[1] for name in fixture.names(pattern)]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise FixtureError(f"has {pattern} of {unknown}; known are {list(known)}")
    return names


def _model(fixture: Fixture, options: list[Any]) -> nn.Module:
    shapes = shapes_of(fixture)
    keys = ["NUM_CLASSES", shapes["proposal_generator.fcos_head.cls_logits.bias"][0], *options]
    keys[::2] = [f"FCOS.{key}" for key in keys[::2]]
    return filled(small_config(_CONFIG, shapes, keys), shapes)


def _labeled(fixture: Fixture, empty: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    return [
        {**item, "instances": objects_of(fixture, name, name in empty)}
        for name, item in zip(image_names(fixture), inputs_of(fixture))
    ]


def _compare_network(fixture: Fixture, model: nn.Module) -> None:
    seen: dict[str, Any] = {}
    head = model.proposal_generator.fcos_head
    hooks = [
        model.backbone.register_forward_hook(lambda *call: seen.update(levels=call[2])),
        head.register_forward_hook(lambda *call: seen.update(head=call[2])),
    ]
    with torch.no_grad():
        model(inputs_of(fixture))
    for hook in hooks:
        hook.remove()
    for part, levels in zip(("logits", "reg", "ctr"), seen["head"]):
        for index, level in enumerate(levels):
            fixture.compare(f"eval/head/{part}{index}", level)
    for name in fixture.names("eval/fpn/*"):
        level = seen["levels"][name.rpartition("/")[2].partition("_")[0]]
        numbers = torch.stack([level.mean(), level.std()]) if name.endswith("_mean_std") else level
        fixture.compare(name, numbers)


def _compare_targets(fixture: Fixture, folder: str, model: nn.Module) -> None:
    fcos = model.proposal_generator
    levels = [fixture.tensor(f"eval/head/ctr{index}") for index in range(len(fcos.in_features))]
    anchors = fcos.anchor_generator(levels)
    gt = [item["instances"] for item in _labeled(fixture)]
    _, targets = fcos.targets(anchors, gt)
    offsets = np.cumsum([0, *map(len, gt)])[:-1]
    counts = [len(level) for level in anchors]
    indices = targets.objects + torch.from_numpy(offsets)[:, None]
    rows = (targets.classes, targets.ltrb.transpose(1, 2), indices, targets.positive)
    for index, (labels, reg, objects, positive) in enumerate(
        zip(*(per_level(part, counts) for part in rows))
    ):
        fixture.compare(f"{folder}/labels{index}", labels)
        # Both are arbitrary for background.
        for name, actual in ((f"{folder}/reg{index}", reg), (f"{folder}/gt_inds{index}", objects)):
            expected = fixture.tensor(name).to(actual)
            mask = positive.view(-1, *[1] * (actual.dim() - 1))
            fixture.compare(name, torch.where(mask, actual, expected))


def _compare_functions(fixture: Fixture) -> None:
    pred, target = (fixture.tensor(f"fn/ious/{name}").t()[None] for name in ("pred", "target"))
    iou, giou = smoothed_ious(pred, target)
    fixture.compare("fn/ious/iou", iou[0])
    fixture.compare("fn/ious/giou", giou[0])
    fixture.compare("fn/ctrness", centerness_of(target)[0])
    for name in fixture.names("fn/locations_*"):
        size, stride = name[len("fn/locations_") :].split("_s")
        height, width = map(int, size.split("x"))
        generator = DefaultAnchorGenerator(
            sizes=[[int(stride)]], aspect_ratios=[1.0], strides=[int(stride)], offset=0.5
        )
        (squares,) = generator([torch.empty(1, 1, height, width)])
        fixture.compare(name, squares.get_centers())
