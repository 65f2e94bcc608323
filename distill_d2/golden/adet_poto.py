"""Fixtures of POTO: heads, detections, losses, gradients and targets of small networks.

The weights follow from their names by ``by_recipe``; the networks from the shapes in "<network>/keys".
The first image is judged at 1.5 times its size, the others at their own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from distill_d2 import add_distill_config
from distill_d2.config import load_yaml
from distill_d2.model_zoo import get_config_file
from distill_d2.projects.poto import POTO
from distill_d2.projects.poto.poto import Rows, Targets

from . import Fixture, golden_kind
from .adet import by_recipe

Shapes = dict[str, Sequence[int]]
Inputs = list[dict[str, Any]]
Levels = list[torch.Tensor]

# The reference cannot have more candidates than the smallest of the fixtures' levels has locations.
_AUX_TOPK = 2
_DEPTHS = {6: 50, 23: 101, 36: 152}  # by the number of blocks in res4
_PIXELS = {"rtol": 0, "atol": 2e-3}
_EXACT = {"rtol": 0, "atol": 0}
_SUMS = {"rtol": 5e-5, "atol": 1e-6}


@golden_kind(holds=["image0", "gt/img0/boxes", "*/keys", "*/eval/head/reg0"], rtol=0, atol=1e-4)
def adet_poto(fixture: Fixture) -> None:
    inputs = _inputs(fixture)
    for name in fixture.names("*/keys"):
        network = name[: -len("/keys")]
        model = filled(json.loads(str(fixture[name])), f"{network}/train/loss_cls_aux" in fixture.arrays)
        _compare_inference(fixture, network, model.eval(), inputs)
        _compare_training(fixture, network, model.train(), inputs)


def filled(shapes: Shapes, auxiliary: bool) -> POTO:
    """The network of these parameters, with weights of the recipe."""
    cfg = get_cfg()
    add_distill_config(cfg)
    load_yaml(cfg, get_config_file("Base-POTO.yaml"))
    cfg.merge_from_list([item for pair in _settings(shapes).items() for item in pair])
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.POTO.AUX_TOPK", _AUX_TOPK])
    cfg.MODEL.POTO.USE_AUX = auxiliary
    model = build_model(cfg)
    model.load_state_dict({name: by_recipe(name, shape) for name, shape in shapes.items()})  # strict
    return model


def _settings(shapes: Shapes) -> dict[str, Any]:
    """The config keys that follow from the shapes."""
    wide, grouped = (shapes[f"backbone.bottom_up.res2.0.conv{i}.weight"] for i in (1, 2))
    blocks = [name for name in shapes if ".res4." in name and name.endswith(".conv3.weight")]
    tower = [name for name in shapes if ".cls_subnet." in name and name.endswith(".weight")]
    convolutions = [name for name in tower if len(shapes[name]) == 4]
    return {
        "MODEL.RESNETS.DEPTH": _DEPTHS[len(blocks)],
        "MODEL.RESNETS.STEM_OUT_CHANNELS": shapes["backbone.bottom_up.stem.conv1.weight"][0],
        "MODEL.RESNETS.RES2_OUT_CHANNELS": shapes["backbone.bottom_up.res2.0.conv3.weight"][0],
        "MODEL.RESNETS.NUM_GROUPS": wide[0] // grouped[1],
        "MODEL.RESNETS.WIDTH_PER_GROUP": grouped[1],
        "MODEL.FPN.OUT_CHANNELS": shapes["backbone.fpn_lateral3.weight"][0],
        "MODEL.POTO.NUM_CLASSES": shapes["head.cls_score.weight"][0],
        "MODEL.POTO.NUM_CONVS": len(convolutions),
        "MODEL.POTO.NORM": "GN" if len(tower) > len(convolutions) else "",
        "MODEL.POTO.USE_3DMF": "head.filter.weight" in shapes,
        "MODEL.POTO.FILTER_NORM": "GN" if "head.max3d.norm.weight" in shapes else "",
    }


def _inputs(fixture: Fixture) -> Inputs:
    inputs = []
    for index, name in enumerate(fixture.names("image*")):
        image = torch.tensor(fixture[name])
        size = tuple(image.shape[-2:])
        scale = 1.5 if index == 0 else 1.0
        instances = Instances(
            size,
            gt_boxes=Boxes(fixture.tensor(f"gt/img{index}/boxes")),
            gt_classes=fixture.tensor(f"gt/img{index}/classes"),
        )
        height, width = (int(side * scale) for side in size)
        inputs.append({"image": image, "instances": instances, "height": height, "width": width})
    return inputs


@torch.no_grad()
def _compare_inference(fixture: Fixture, network: str, model: POTO, inputs: Inputs) -> None:
    outputs = _head(model, inputs)[1]
    strides = [int(stride) for stride in model.anchor_generator.strides]
    pixels = [level.relu() * stride for level, stride in zip(outputs[1], strides)]
    for part, levels in zip(("cls", "reg", "filter"), (outputs[0], pixels, *outputs[2:])):
        for index, level in enumerate(levels):
            tolerance = _PIXELS if part == "reg" else {}
            fixture.compare(f"{network}/eval/head/{part}{index}", level, **tolerance)
    for index, output in enumerate(model(inputs)):
        prefix, found = f"{network}/eval/img{index}", output["instances"]
        fixture.compare(f"{prefix}/boxes", found.pred_boxes.tensor, **_PIXELS)
        fixture.compare(f"{prefix}/scores", found.scores)
        fixture.compare(f"{prefix}/classes", found.pred_classes, **_EXACT)


def _compare_training(fixture: Fixture, network: str, model: POTO, inputs: Inputs) -> None:
    losses = model(inputs)
    sum(losses.values()).backward()
    for name, value in losses.items():
        fixture.compare(f"{network}/train/{name}", value, **_SUMS)
    parameters = dict(model.named_parameters())
    prefix = f"{network}/train/gradnorm/"
    for name in fixture.names(f"{prefix}*"):
        fixture.compare(name, parameters[name[len(prefix) :]].grad.norm(), **_SUMS)
    with torch.no_grad():
        rows = model.rows(*_head(model, inputs))
    objects = [item["instances"] for item in inputs]
    _compare_targets(fixture, network, model, rows, model.targets(rows, objects), sum(map(len, objects)))


def _compare_targets(
    fixture: Fixture, network: str, model: POTO, rows: Rows, targets: Targets, objects: int
) -> None:
    images, locations, _ = targets.pairs
    classes = torch.full(rows.logits.shape[:2], model.num_classes)
    classes[images, locations] = targets.classes
    anchors = rows.anchors[locations]
    deltas = torch.zeros_like(rows.deltas)
    distances = model.box2box_transform.get_deltas(anchors, targets.boxes)
    deltas[images, locations] = distances * (anchors[:, 2:3] - anchors[:, :1])
    fixture.compare(f"{network}/targets/classes", classes, **_EXACT)
    fixture.compare(f"{network}/targets/deltas", deltas)
    fixture.compare(f"{network}/train/num_fg_per_gt", len(images) / objects, **_EXACT)
    if targets.auxiliary is not None:
        fixture.compare(f"{network}/targets/aux_classes", targets.auxiliary, **_EXACT)
        count = int((targets.auxiliary != model.num_classes).sum())
        fixture.compare(f"{network}/train/num_fg_per_gt_aux", count / objects, **_EXACT)


def _head(model: POTO, inputs: Inputs) -> tuple[Levels, tuple[Levels, ...]]:
    """The levels that the head reads, and its outputs."""
    features = model.backbone(model.preprocess_image(inputs).tensor)
    levels = [features[name] for name in model.head_in_features]
    return levels, model.head(levels)
