"""What fixtures of AdelaiDet's detectors share: small models by their keys, weights by a recipe."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import nn

from distill_d2 import add_distill_config
from distill_d2.config import load_yaml
from distill_d2.model_zoo import get_config_file

from . import Fixture, FixtureError

RTOL = 1e-4  # of losses and of gradients' norms
BOXES = 2e-3  # pixels

Shapes = dict[str, tuple[int, ...]]

_CONSTRUCTED = ("num_batches_tracked", "_iter", "sizes_of_interest")
_SCORES = ("cls_logits.bias", "cate_pred.bias", "cls_score.bias", "mask_branch.logits.bias")
_SHRUNK = {"stem.conv1.weight": 0.005, "controller.weight": 0.3, "kernel_pred.weight": 0.3}
_DEPTHS = {6: 50, 23: 101, 36: 152}  # by blocks in res4


def shapes_of(fixture: Fixture, name: str = "keys") -> Shapes:
    """Shapes by key of the model that a fixture is of."""
    return {key: tuple(shape) for key, shape in json.loads(str(fixture[name])).items()}


def small_config(config: str, shapes: Shapes, options: Sequence[Any] = ()) -> CfgNode:
    """A packaged config with the widths and depth that the shapes have, and keys of MODEL."""
    cfg = get_cfg()
    add_distill_config(cfg)
    load_yaml(cfg, get_config_file(config))
    cfg.MODEL.DEVICE = "cpu"
    node, body = cfg.MODEL.RESNETS, "backbone.bottom_up"
    blocks = [key for key in shapes if f"{body}.res4." in key and "conv1.weight" in key]
    node.DEPTH = _DEPTHS[len(blocks)]
    node.STEM_OUT_CHANNELS = shapes[f"{body}.stem.conv1.weight"][0]
    node.WIDTH_PER_GROUP = shapes[f"{body}.res2.0.conv1.weight"][0]
    node.RES2_OUT_CHANNELS = shapes[f"{body}.res2.0.conv3.weight"][0]
    cfg.MODEL.FPN.OUT_CHANNELS = shapes["backbone.fpn_lateral5.weight"][0]
    pairs = list(zip(options[::2], options[1::2]))
    cfg.merge_from_list([part for key, value in pairs for part in (f"MODEL.{key}", value)])
    return cfg


def filled(cfg: CfgNode, shapes: Shapes) -> nn.Module:
    """The model of a config, in evaluation, with weights of the recipe.

    Raises:
        FixtureError: its keys or shapes are not those of the fixture.
    """
    model = build_model(cfg).eval()
    state = model.state_dict()
    actual = {key: tuple(tensor.shape) for key, tensor in state.items()}
    different = sorted(set(actual.items()) ^ set(shapes.items()))
    if different:
        raise FixtureError(f"comes from a model with other keys or shapes: {different[:6]}")
    for key, tensor in state.items():
        if not key.endswith(_CONSTRUCTED):
            tensor.copy_(by_recipe(key, tuple(tensor.shape)))
    return model


def by_recipe(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The numbers that the fixtures give to the tensor of this key."""
    random = np.random.RandomState(zlib.crc32(key.encode()) & 0x7FFFFFFF)
    z = random.standard_normal(shape)
    if key.endswith("running_var"):
        z = np.ones(shape)
    elif key.endswith("running_mean"):
        z = 0.1 * z
    elif len(shape) == 4:
        factors = [value for name, value in _SHRUNK.items() if key.endswith(name)]
        z = z * np.sqrt(2 / np.prod(shape[1:])) * (factors[0] if factors else 1.0)
    elif key.endswith("conv3.norm.weight"):
        z = 0.25 * (1 + 0.1 * z)
    elif key.endswith((".weight", ".scale")):
        z = 1 + 0.1 * z
    else:
        offset = 2.0 if key.endswith("bbox_pred.bias") else -3.0 if key.endswith(_SCORES) else 0.0
        z = 0.1 * z + offset
    return torch.from_numpy(np.asarray(z)).float()


def image_names(fixture: Fixture) -> list[str]:
    """The images' numbers, "0", "1" and so on."""
    return [name[len("image") :] for name in fixture.names("image[0-9]*")]


def inputs_of(fixture: Fixture, sizes: str = "") -> list[dict[str, Any]]:
    """The fixture's images, to be detected at the sizes "<sizes>/img0/image_size", if there is such."""
    inputs = []
    for name in image_names(fixture):
        image = torch.from_numpy(fixture[f"image{name}"])
        inputs.append({"image": image})
        if sizes:
            height, width = fixture[f"{sizes}/img{name}/image_size"].tolist()
            inputs[-1].update(height=height, width=width)
    return inputs


def objects_of(fixture: Fixture, name: str, empty: bool = False) -> Instances:
    """The objects of an image, or none."""
    boxes, classes = (fixture.tensor(f"gt/img{name}/{part}") for part in ("boxes", "classes"))
    if empty:
        boxes, classes = boxes[:0], classes[:0]
    size = tuple(fixture[f"image{name}"].shape[-2:])
    return Instances(size, gt_boxes=Boxes(boxes), gt_classes=classes.long())


def compare_training(
    fixture: Fixture, folder: str, model: nn.Module, inputs: list[dict[str, Any]]
) -> None:
    """The losses of one step, and norms of gradients of their sum, "<folder>/gradnorm/<parameter>"."""
    model.train()
    losses = model(inputs)
    expected = fixture.names(f"{folder}/loss_*")
    if {name.rpartition("/")[2] for name in expected} != set(losses):
        raise FixtureError(f"has the losses {expected}; the model returns {sorted(losses)}")
    for name in expected:
        fixture.compare(name, losses[name.rpartition("/")[2]], RTOL, 1e-6)
    norms = fixture.names(f"{folder}/gradnorm/*")
    if not norms:
        return
    model.zero_grad()
    sum(losses.values()).backward()
    parameters = dict(model.named_parameters())
    for name in norms:
        gradient = parameters[name[len(f"{folder}/gradnorm/") :]].grad
        fixture.compare(name, gradient.norm(), RTOL, 1e-6)


def compare_instances(
    fixture: Fixture, folder: str, found: Instances, others: Sequence[str] = ()
) -> None:
    """One image's detections; where scores are nearly equal the order may be another."""
    arrays = {
        "pred_boxes": found.pred_boxes.tensor,
        **{name: getattr(found, name) for name in ("scores", "pred_classes", "locations", "fpn_levels")},
        **{name: getattr(found, name) for name in others},
    }
    order = _order(fixture, folder, arrays)
    for name, values in arrays.items():
        fixture.compare(f"{folder}/{name}", values[order], atol=BOXES if name == "pred_boxes" else None)
    fixture.compare(f"{folder}/image_size", np.array(found.image_size))


def _order(fixture: Fixture, folder: str, arrays: dict[str, torch.Tensor]) -> torch.Tensor:
    """The permutation that sorts ``arrays`` as the fixture by level, class and location.

    The identity if the rows differ, so that the comparison itself reports them.
    """
    names = ("fpn_levels", "pred_classes", "locations")
    actual = [tuple(row) for row in _table([arrays[name].numpy() for name in names]).tolist()]
    expected = [tuple(row) for row in _table([fixture[f"{folder}/{name}"] for name in names]).tolist()]
    if sorted(actual) != sorted(expected) or len(set(actual)) < len(actual):
        return torch.arange(len(actual))
    places = {row: index for index, row in enumerate(actual)}
    return torch.tensor([places[row] for row in expected], dtype=torch.int64)


def _table(columns: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([column.reshape(len(column), -1) for column in columns], axis=1)


def per_level(rows: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
    """(N, R, ...) as levels of N images each: (N P, ...)."""
    return [level.flatten(0, 1) for level in rows.split(list(counts), dim=1)]
