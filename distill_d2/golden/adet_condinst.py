"""Fixtures of AdelaiDet's CondInst: a small model's masks, detections, targets, losses, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Instances, PolygonMasks
from detectron2.structures.masks import polygons_to_bitmask
from torch import nn

from distill_d2.projects.condinst.mask_branch import aligned_bilinear
from distill_d2.projects.condinst.mask_head import DynamicMaskHead, dice_losses
from distill_d2.projects.condinst.truth import mask_truth

from . import Fixture, FixtureError, golden_kind
from .adet import (
    Shapes,
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

_CONFIG = "CondInst/MS_R_50_1x.yaml"
_MASK_PIXELS = 4  # of a mask that may differ: those whose probability is 0.5
_TRAININGS = {
    "poly": [],
    "bitmask": [],
    "sem": ["CONDINST.MASK_BRANCH.SEMANTIC_LOSS_ON", True],
    "topk10": ["CONDINST.MAX_PROPOSALS", -1, "CONDINST.TOPK_PROPOSALS_PER_IM", 10],
    "out_stride8": ["CONDINST.MASK_OUT_STRIDE", 8],
    "out_stride2": ["CONDINST.MASK_OUT_STRIDE", 2],
    "no_rel_coords": ["CONDINST.MASK_HEAD.DISABLE_REL_COORDS", True],
}


@golden_kind(
    holds=["keys", "image0", "eval/img*/mask_feats", "train/*/loss_mask", "gt/img*/poly0"],
    rtol=0,
    atol=1e-4,
)
def adet_condinst(fixture: Fixture) -> None:
    _compare_network(fixture)
    for name in _found(fixture, "train/*/loss_mask", _TRAININGS):
        _compare_training(fixture, name)
    _compare_truth(fixture)
    _compare_targets(fixture)
    _compare_functions(fixture)


def _found(fixture: Fixture, pattern: str, known: Sequence[str]) -> list[str]:
    names = [name.split("/")[1] for name in fixture.names(pattern)]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise FixtureError(f"has {pattern} of {unknown}; known are {list(known)}")
    return names


def _model(fixture: Fixture, name: str = "", options: Sequence[Any] = ()) -> nn.Module:
    shapes: Shapes = shapes_of(fixture, "keys_sem" if name == "sem" else "keys")
    cfg = small_config(_CONFIG, shapes, [*options, *_TRAININGS.get(name, [])])
    if name == "no_rel_coords":  # two inputs of the first convolution less
        less = 2 * cfg.MODEL.CONDINST.MASK_HEAD.CHANNELS
        for leaf in ("weight", "bias"):
            count, *others = shapes[f"controller.{leaf}"]
            shapes[f"controller.{leaf}"] = (count - less, *others)
    cfg.MODEL.FCOS.NUM_CLASSES = shapes["proposal_generator.fcos_head.cls_logits.bias"][0]
    cfg.MODEL.CONDINST.MASK_BRANCH.CHANNELS = shapes["mask_branch.tower.0.0.weight"][0]
    return filled(cfg, shapes)


# Evaluation: one image at a time


def _compare_network(fixture: Fixture) -> None:
    folders = {name.split("/")[1] for name in fixture.names("eval/post*/img0/scores")}
    for folder in sorted(folders):
        limit = int(folder[len("post") :])
        model = _model(fixture, options=["FCOS.POST_NMS_TOPK_TEST", limit])
        images = zip(image_names(fixture), inputs_of(fixture, f"eval/{folder}"))
        for image, item in images:
            seen = _observed(model, item)
            _compare_parts(fixture, f"eval/img{image}", seen)
            _compare_detections(fixture, f"eval/{folder}/img{image}", seen["output"])


@torch.no_grad()
def _observed(model: nn.Module, item: dict[str, Any]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    parts = {
        "head": model.proposal_generator.fcos_head,
        "branch": model.mask_branch,
        "detections": model.proposal_generator,
    }
    hooks = [
        module.register_forward_hook(lambda *call, part=part: seen.update({part: call[2]}))
        for part, module in parts.items()
    ]
    (output,) = model([item])
    for hook in hooks:
        hook.remove()
    (found,), _ = seen["detections"]
    arguments = (found.top_feat, found.locations, found.fpn_levels, [len(found)])
    logits = model.mask_head(seen["branch"][0], *arguments)
    return {**seen, "output": output["instances"], "mask_logits": logits}


def _compare_parts(fixture: Fixture, folder: str, seen: dict[str, Any]) -> None:
    for part, levels in zip(("logits", "reg", "ctr", "top_feats"), seen["head"]):
        for index, level in enumerate(levels):
            if f"{folder}/head/{part}{index}" in fixture.arrays:
                fixture.compare(f"{folder}/head/{part}{index}", level)
    fixture.compare(f"{folder}/mask_feats", seen["branch"][0])
    logits = seen["mask_logits"]
    for name in fixture.names(f"{folder}/mask_logits_*"):
        kind = name[len(f"{folder}/mask_logits_") :]
        if kind == "mean_std":
            fixture.compare(name, torch.stack([logits.mean(), logits.std()]))
        else:
            fixture.compare(name, logits[: int(kind[len("first") :])])


def _compare_detections(fixture: Fixture, folder: str, found: Instances) -> None:
    compare_instances(fixture, folder, found, ["top_feat"])
    fixture.compare(f"{folder}/im_inds", np.zeros(len(found)))  # of a batch of one
    masks, name = found.pred_masks, f"{folder}/pred_masks"
    fixture.compare(f"{name}_shape", np.array(masks.shape))
    expected = fixture[f"{name}_packed"]
    actual = np.packbits(masks.flatten(1).numpy(), axis=1)
    if actual.shape == expected.shape:
        different = np.unpackbits(actual ^ expected, axis=1).sum(axis=1)
        actual = np.where((different <= _MASK_PIXELS)[:, None], expected, actual)
    fixture.compare(f"{name}_packed", actual)
    fixture.compare(f"{name}_area", masks.flatten(1).sum(dim=1), atol=_MASK_PIXELS)


# Training


def _labeled(fixture: Fixture, bitmasks: bool = False) -> list[dict[str, Any]]:
    inputs = inputs_of(fixture)
    for name, item in zip(image_names(fixture), inputs):
        objects = objects_of(fixture, name)
        polygons = [[fixture[f"gt/img{name}/poly{index}"]] for index in range(len(objects))]
        objects.gt_masks = PolygonMasks(polygons)
        if bitmasks:
            masks = [polygons_to_bitmask(each, *objects.image_size) for each in polygons]
            objects.gt_masks = BitMasks(torch.from_numpy(np.stack(masks)))
        item["instances"] = objects
    return inputs


def _compare_training(fixture: Fixture, name: str) -> None:
    model, inputs = _model(fixture, name), _labeled(fixture, name == "bitmask")
    seen, positives = [], model.positives

    def remembered(*arguments):
        seen.append(positives(*arguments))
        return seen[-1]

    model.positives = remembered
    folder = f"train/{name}"
    compare_training(fixture, folder, model, inputs)
    (found,) = seen
    fixture.compare(f"{folder}/num_mask_instances", len(found.objects))
    fixture.compare(f"{folder}/mask_head__iter", model.mask_head._iter)
    if f"{folder}/gt_inds" not in fixture.arrays:
        return
    gt = [item["instances"] for item in inputs]
    images = np.repeat(np.arange(len(gt)), found.counts)
    offsets = np.cumsum([0, *map(len, gt)])[:-1]
    classes = np.concatenate([each.gt_classes.numpy() for each in gt])
    indices = found.objects.numpy() + offsets[images]
    actual = {
        "gt_inds": indices,
        "locations": found.locations.numpy(),
        "fpn_levels": found.levels.numpy(),
        "labels": classes[indices],
    }
    expected = {part: fixture[f"{folder}/{part}"] for part in actual}
    if len(expected["gt_inds"]) == len(indices):  # actual rows in the order of the fixture
        place = np.empty(len(indices), dtype=int)
        place[_sorted(expected)] = _sorted(actual)
        actual = {part: values[place] for part, values in actual.items()}
    for part, values in actual.items():
        fixture.compare(f"{folder}/{part}", values)


def _sorted(instances: dict[str, np.ndarray]) -> np.ndarray:
    x, y = instances["locations"].T
    return np.lexsort((x, y, instances["fpn_levels"], instances["gt_inds"]))


# Ground truth


def _compare_truth(fixture: Fixture) -> None:
    model = _model(fixture)
    size = [model.mask_head.in_stride * length for length in fixture["eval/img0/mask_feats"].shape[2:]]
    for name, item in zip(image_names(fixture), _labeled(fixture)):
        for strided in fixture.names(f"gt/img{name}/bitmasks_s*"):
            stride = int(strided.rpartition("_s")[2])
            truth = mask_truth(item["instances"], size, stride, 8, model.num_classes)
            fixture.compare(strided, truth.masks)
        full = mask_truth(item["instances"], size, 1, 8, model.num_classes).masks
        packed = np.packbits(full.flatten(1).numpy().astype(np.uint8), axis=1)
        fixture.compare(f"gt/img{name}/bitmasks_full_packed", packed)


def _compare_targets(fixture: Fixture) -> None:
    model = _model(fixture)
    seen: dict[str, Any] = {}
    hook = model.proposal_generator.register_forward_hook(lambda *call: seen.update(extras=call[2][0]))
    model.train()(_labeled(fixture))
    hook.remove()
    targets, points = seen["extras"]["targets"], seen["extras"]["points"]
    offsets = np.cumsum([0] + [len(item["instances"]) for item in _labeled(fixture)])[:-1]
    indices = targets.objects + torch.from_numpy(offsets)[:, None]
    counts = points.levels.bincount().tolist()
    rows = (per_level(part, counts) for part in (targets.classes, indices, targets.positive))
    for index, (labels, objects, positive) in enumerate(zip(*rows)):
        fixture.compare(f"targets/labels{index}", labels)
        expected = fixture.tensor(f"targets/gt_inds{index}").long()  # arbitrary for background
        fixture.compare(f"targets/gt_inds{index}", torch.where(positive, objects, expected))


# Functions


def _compare_functions(fixture: Fixture) -> None:
    for name in fixture.names("fn/aligned_bilinear/x*"):
        factor = int(name.rpartition("/x")[2])
        fixture.compare(name, aligned_bilinear(fixture.tensor("fn/aligned_bilinear/in"), factor))
    masks = (fixture.tensor(f"fn/dice/{part}") for part in ("pred", "target"))
    fixture.compare("fn/dice/loss", dice_losses(*masks))
    _compare_dynamic_head(fixture)


def _compare_dynamic_head(fixture: Fixture) -> None:
    sizes = _model(fixture).mask_head.sizes_of_interest.tolist()
    for name in fixture.names("fn/dyn/mask_logits_s*_to_s*"):
        in_stride, out_stride = (int(part) for part in name.rpartition("logits_s")[2].split("_to_s"))
        features = fixture.tensor("fn/dyn/mask_feats")
        head = DynamicMaskHead(
            in_channels=features.shape[1],
            in_stride=in_stride,
            out_stride=out_stride,
            sizes_of_interest=sizes,
        )
        images = fixture["fn/dyn/im_inds"]
        order = np.argsort(images, kind="stable")
        params, locations, levels = (
            fixture.tensor(f"fn/dyn/{part}")[order] for part in ("params", "locations", "fpn_levels")
        )
        counts = np.bincount(images, minlength=len(features)).tolist()
        logits = head(features, params, locations, levels, counts)
        fixture.compare(name, logits[np.argsort(order)])
