"""Fixtures of SOLOv2 as AdelaiDet has it: a small network, and its functions alone.

Sizes of the network follow from its tensors' shapes ("keys"), weights from their names by ``by_recipe``.
The boxes of the fixture's detections are zeros and are not compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances

from distill_d2 import add_distill_config
from distill_d2.config import load_yaml
from distill_d2.model_zoo import get_config_file
from distill_d2.projects.solov2 import SOLOv2
from distill_d2.projects.solov2.losses import dice_loss
from distill_d2.projects.solov2.nms import mask_ious, mask_nms, matrix_nms, point_nms
from distill_d2.projects.solov2.targets import centers, downscale

from . import Fixture, FixtureError, golden_kind
from .adet import by_recipe

_CONFIG = "SOLOv2/R50_3x.yaml"
_EXACT = {"rtol": 0, "atol": 0}
_GRADIENTS = {"rtol": 1e-4, "atol": 1e-6}
_PIXELS = 4  # of a mask that may differ
_BLOCKS = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}


@golden_kind(
    holds=["keys", "eval/head/cate*", "eval/head/kernel*", "eval/mask_feat", "targets/img*/order*"],
    rtol=0,
    atol=1e-4,
)
def adet_solov2(fixture: Fixture) -> None:
    _compare_functions(fixture)
    inputs = _inputs(fixture)
    model = filled(fixture)
    _compare_outputs(fixture, model, inputs)
    for variant in _variants(fixture, "eval/*/img*/scores"):
        _compare_detections(fixture, variant, inputs)
    _compare_targets(fixture, model, inputs)
    for variant in _variants(fixture, "train/*/loss_*"):
        _compare_losses(fixture, variant, model, _training_inputs(inputs, variant))


def _variants(fixture: Fixture, pattern: str) -> list[str]:
    return sorted({name.split("/")[1] for name in fixture.names(pattern)})


# The network.


def filled(fixture: Fixture, **keys: Any) -> SOLOv2:
    """The network, in evaluation, with weights of the recipe; ``keys`` are of MODEL.SOLOV2."""
    shapes = json.loads(str(fixture["keys"]))
    model = build_model(_config(fixture, shapes, keys)).eval()
    actual = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    different = [name for name in {**actual, **shapes} if actual.get(name) != shapes.get(name)]
    if different:
        raise FixtureError(f"comes from a network with other tensors: {different[:10]}")
    model.load_state_dict({name: by_recipe(name, shape) for name, shape in shapes.items()})
    return model


def _config(fixture: Fixture, shapes: dict[str, list[int]], keys: dict[str, Any]) -> CfgNode:
    cfg = get_cfg()
    add_distill_config(cfg)
    load_yaml(cfg, get_config_file(_CONFIG))
    cfg.MODEL.DEVICE = "cpu"
    body = "backbone.bottom_up"
    convs = [re.fullmatch(rf"{body}\.(res\d)\.\d+\.conv1\.weight", name) for name in shapes]
    stages = [found.group(1) for found in convs if found]
    blocks = tuple(map(stages.count, sorted(set(stages))))
    if blocks not in _BLOCKS:
        raise FixtureError(f"has a ResNet of {blocks} blocks; known are {list(_BLOCKS)}")
    resnet = cfg.MODEL.RESNETS
    resnet.DEPTH = _BLOCKS[blocks]
    resnet.STEM_OUT_CHANNELS = shapes[f"{body}.stem.conv1.weight"][0]
    resnet.WIDTH_PER_GROUP = shapes[f"{body}.res2.0.conv1.weight"][0]
    resnet.RES2_OUT_CHANNELS = shapes[f"{body}.res2.0.conv3.weight"][0]
    cfg.MODEL.FPN.OUT_CHANNELS = shapes["backbone.fpn_output2.weight"][0]
    node = cfg.MODEL.SOLOV2
    node.INSTANCE_IN_CHANNELS = node.MASK_IN_CHANNELS = cfg.MODEL.FPN.OUT_CHANNELS
    node.NUM_CLASSES, node.INSTANCE_CHANNELS = shapes["ins_head.cate_pred.weight"][:2]
    node.NUM_KERNELS = node.NUM_MASKS = shapes["ins_head.kernel_pred.weight"][0]
    node.MASK_CHANNELS = shapes["mask_head.conv_pred.0.weight"][1]
    levels = range(len(fixture.names("eval/head/cate*")))
    node.NUM_GRIDS = [fixture[f"eval/head/cate{level}"].shape[-1] for level in levels]
    for key, value in keys.items():
        node[key] = value
    return cfg


def _inputs(fixture: Fixture) -> list[dict[str, Any]]:
    inputs = []
    for index in range(len(fixture.names("image[0-9]*"))):
        image = torch.from_numpy(fixture[f"image{index}"])
        truth, size = f"gt/img{index}", tuple(image.shape[1:])
        masks = _unpacked(fixture[f"{truth}/masks_packed"], fixture[f"{truth}/masks_shape"])
        instances = Instances(size, gt_boxes=Boxes(fixture.tensor(f"{truth}/boxes")))
        instances.gt_classes = fixture.tensor(f"{truth}/classes").long()
        instances.gt_masks = BitMasks(torch.from_numpy(masks))
        inputs.append({"image": image, "instances": instances})
    return inputs


# What it computes.


@torch.no_grad()
def _compare_outputs(fixture: Fixture, model: SOLOv2, inputs: list[dict[str, Any]]) -> None:
    images = model.preprocess_image(inputs)
    logits, kernels, features = model.predict(model.backbone(images.tensor))
    for level, (scores, weights) in enumerate(zip(logits, kernels)):
        fixture.compare(f"eval/head/cate{level}", scores)
        fixture.compare(f"eval/head/kernel{level}", weights)
    fixture.compare("eval/mask_feat", features)


@torch.no_grad()
def _compare_detections(fixture: Fixture, variant: str, inputs: list[dict[str, Any]]) -> None:
    """From the outputs that the fixture has: rounding errors of convolutions may swap two detections."""
    model = filled(fixture, **_settings(variant))
    logits, kernels = (
        [fixture.tensor(f"eval/head/{part}{level}") for level in range(len(model.ins_in_features))]
        for part in ("cate", "kernel")
    )
    images = [tuple(item["image"].shape[1:]) for item in inputs]
    outputs = [
        tuple(map(int, fixture[fixture.names(f"eval/*/img{index}/image_size")[0]]))
        for index in range(len(inputs))
    ]
    found = model.instances(logits, kernels, fixture.tensor("eval/mask_feat"), images, outputs)
    for index, instances in enumerate(found):
        _compare_instances(fixture, f"eval/{variant}/img{index}", instances)


def _compare_instances(fixture: Fixture, folder: str, found: Instances) -> None:
    fixture.compare(f"{folder}/scores", found.scores)
    fixture.compare(f"{folder}/pred_classes", found.pred_classes, **_EXACT)
    area = found.pred_masks.flatten(1).sum(dim=1)
    fixture.compare(f"{folder}/pred_masks_area", area, rtol=0, atol=_PIXELS)
    if f"{folder}/pred_masks_packed" in fixture.arrays:
        fixture.compare(f"{folder}/image_size", np.array(found.image_size), **_EXACT)
        fixture.compare(f"{folder}/pred_masks_shape", np.array(found.pred_masks.shape), **_EXACT)
        _compare_masks(fixture, f"{folder}/pred_masks_packed", found.pred_masks, _PIXELS)


def _settings(variant: str) -> dict[str, Any]:
    """Keys of MODEL.SOLOV2 that a variant's name stands for, such as "mask_nms", "nmspre40_max10"."""
    if variant in ("matrix_gaussian", "matrix_linear"):
        return {"NMS_TYPE": "matrix", "NMS_KERNEL": variant.partition("_")[2]}
    if variant == "mask_nms":
        return {"NMS_TYPE": "mask"}
    limits = re.fullmatch(r"nmspre(\d+)_max(\d+)", variant)
    if limits is None:
        raise FixtureError(f"has detections 'eval/{variant}', whose settings are unknown")
    return dict(zip(("NMS_PRE", "MAX_PER_IMG"), map(int, limits.groups())))


def _compare_masks(fixture: Fixture, name: str, masks: torch.Tensor, most: int) -> None:
    """Compare packed masks (n, H, W); up to ``most`` pixels of each may differ."""
    actual, expected = np.packbits(masks.flatten(1).numpy(), axis=1), fixture[name]
    if actual.shape == expected.shape:
        different = np.unpackbits(actual ^ expected, axis=1).sum(axis=1)
        actual = np.where((different <= most)[:, None], expected, actual)
    fixture.compare(name, actual, **_EXACT)


def _unpacked(packed: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    pixels = int(np.prod(shape[1:]))
    return np.unpackbits(packed, axis=1, count=pixels).reshape(tuple(shape)).astype(bool)


# What it is trained with.


def _compare_targets(fixture: Fixture, model: SOLOv2, inputs: list[dict[str, Any]]) -> None:
    padded = tuple(model.preprocess_image(inputs).tensor.shape[-2:])
    assigner, grids = model.targets, model.ins_head.num_grids
    objects = [assigner.objects(item["instances"], padded, model.device) for item in inputs]
    targets = assigner(objects, padded, model.mask_stride)
    areas = [grid**2 for grid in grids]
    for image, (instances, per_image) in enumerate(zip(objects, targets)):
        cells, there = assigner.cells(instances, padded)
        classes = per_image.classes.split(areas)
        for level, (grid, first) in enumerate(zip(grids, np.cumsum([0, *areas]))):
            index, _ = there[level].nonzero(as_tuple=True)
            folder = f"targets/img{image}"
            fixture.compare(f"{folder}/cate{level}", classes[level].view(grid, grid), **_EXACT)
            order = cells[level][there[level]] - int(first)
            fixture.compare(f"{folder}/order{level}", order, **_EXACT)
            _compare_masks(fixture, f"{folder}/ins{level}_packed", per_image.masks[index], 0)


def _training_inputs(inputs: list[dict[str, Any]], variant: str) -> list[dict[str, Any]]:
    """The batch of a variant: "default", "img1_first_gt_only", "empty_img1" or "empty_all"."""
    first = re.fullmatch(r"img(\d+)_first_gt_only", variant)
    empty = re.fullmatch(r"empty_img(\d+)", variant)
    if first is None and empty is None and variant not in ("default", "empty_all"):
        raise FixtureError(f"has losses 'train/{variant}', whose batch is unknown")
    kept = [0 if variant == "empty_all" else None] * len(inputs)  # None: all objects
    for found, count in ((first, 1), (empty, 0)):
        if found:
            kept[int(found.group(1))] = count
    return [{**item, "instances": item["instances"][:most]} for item, most in zip(inputs, kept)]


def _compare_losses(fixture: Fixture, variant: str, model: SOLOv2, inputs: list[dict[str, Any]]) -> None:
    model.zero_grad()
    losses = model.train()(inputs)
    sum(losses.values()).backward()
    for name, loss in losses.items():
        fixture.compare(f"train/{variant}/{name}", loss, **_GRADIENTS)
    parameters = dict(model.named_parameters())
    for name in fixture.names(f"train/{variant}/gradnorm/*"):
        gradient = parameters[name.rpartition("/")[2]].grad
        fixture.compare(name, gradient.norm(), **_GRADIENTS)


# Its functions alone.


def _compare_functions(fixture: Fixture) -> None:
    _compare_nms(fixture)
    fixture.compare("fn/point_nms/out", point_nms(fixture.tensor("fn/point_nms/in")))
    masks, target = fixture.tensor("fn/dice/pred"), fixture.tensor("fn/dice/target")
    fixture.compare("fn/dice/loss", dice_loss(masks, target))
    scene = fixture.tensor("fn/imrescale/in").permute(2, 0, 1).bool()
    quarter = fixture["fn/imrescale/out_quarter"]
    actual = downscale(scene, 4, quarter.shape[:2])
    fixture.compare("fn/imrescale/out_quarter", actual.permute(1, 2, 0), **_EXACT)


def _compare_nms(fixture: Fixture) -> None:
    masks, classes = fixture.tensor("fn/nms/masks").bool(), fixture.tensor("fn/nms/labels")
    scores, ious = fixture.tensor("fn/nms/scores"), mask_ious(masks, classes)
    (x, y), _ = centers(masks)
    fixture.compare("fn/com/x", x)
    fixture.compare("fn/com/y", y)
    for name in fixture.names("fn/nms/gaussian_s*"):
        sigma = float(name.rpartition("_s")[2].replace("p", "."))
        fixture.compare(name, scores * matrix_nms(ious, "gaussian", sigma))
    fixture.compare("fn/nms/linear", scores * matrix_nms(ious, "linear"))
    for name in fixture.names("fn/nms/mask_keep_*"):
        threshold = float(name.rpartition("_")[2].replace("p", "."))
        fixture.compare(name, mask_nms(ious, threshold), **_EXACT)
