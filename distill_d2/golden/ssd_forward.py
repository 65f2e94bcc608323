"""Fixtures of SSD's three networks: what their levels and heads compute from one image.

The weights follow from the tensors' names in public checkpoints by ``by_recipe``; names and order of
classes are converted as those of a checkpoint are. The background is the first class of a fixture, and
the last one of projects/SSD. Arrays are "<network>_..." with the networks of CONFIGS.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from distill_d2 import add_distill_config
from distill_d2.config import load_yaml
from distill_d2.model_zoo import get_config_file
from distill_d2.projects.ssd import SSD
from distill_d2.projects.ssd.names import from_public, name_of

from . import Fixture, FixtureError, golden_kind

Weights = dict[str, torch.Tensor]

CONFIGS = {
    "ssd300": "Base-SSD300-VGG16.yaml",
    "vggkd": "Base-SSD-VGG16-teacher.yaml",
    "mb2": "Base-SSD.yaml",
}
_PRECISION = 1e-4  # of an array's standard deviation, or of 1
# Modules of public checkpoints; some networks have some of them.
_VGG = (
    *(f"vgg.{i}" for i in range(35)),
    "L2Norm",
    *(f"extras.{i}" for i in range(10)),
    *(f"{head}.{i}" for head in ("loc", "conf") for i in range(6)),
)
_HEADS = ("regression_headers", "classification_headers")
_MOBILENET = (
    *(f"base_net.{block}.{i}" for block in (0, 18) for i in range(3)),
    *(f"base_net.{block}.conv.{i}" for block in range(1, 18) for i in range(8)),
    *(f"extras.{block}.conv.{i}" for block in range(4) for i in range(8)),
    *(f"{head}.{i}.{part}" for head in _HEADS for i in range(5) for part in range(4)),
    *(f"{head}.5" for head in _HEADS),
)
_LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@golden_kind(holds=["image_rgb_blocks_*", "*_source0_ch0to3_center", "*_conf", "*_loc"], rtol=0, atol=0)
def ssd_forward(fixture: Fixture) -> None:
    networks = {name.partition("_")[0] for name in fixture.arrays} - {"image"}
    if not networks <= set(CONFIGS):
        unknown = sorted(networks - set(CONFIGS))
        raise FixtureError(f"has arrays of unknown networks {unknown}; known are {list(CONFIGS)}")
    image = _image(fixture)
    for network in sorted(networks, key=list(CONFIGS).index):
        _compare_network(fixture, network, filled(CONFIGS[network]), image)


def _image(fixture: Fixture) -> torch.Tensor:
    """(3, H, W), RGB, of the squares of one color that the fixture has."""
    (name,) = fixture.names("image_rgb_blocks_*")
    blocks = fixture.tensor(name)
    side = 300 // len(blocks)
    return blocks.repeat_interleave(side, 0).repeat_interleave(side, 1).permute(2, 0, 1)


def filled(config: str) -> SSD:
    """The network of a packaged config, in evaluation, with weights of the recipe."""
    cfg = get_cfg()
    add_distill_config(cfg)
    load_yaml(cfg, get_config_file(config))
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    public = {name: by_recipe(name, shape) for name, shape in public_shapes(model)}
    weights, dropped, unknown = from_public(public)
    if dropped or unknown:
        raise AssertionError(f"{config}: not converted: {dropped + unknown}")
    model.load_state_dict(weights)  # strict
    return model


def public_shapes(model: SSD) -> Iterator[tuple[str, Sequence[int]]]:
    """Name in a public checkpoint, and shape, of each tensor of a network."""
    state = model.state_dict()
    modules = _MOBILENET if any("running_mean" in name for name in state) else _VGG
    for module, leaf in itertools.product(modules, _LEAVES):
        name = name_of(f"{module}.{leaf}")
        if name in state:
            yield f"{module}.{leaf}", tuple(state[name].shape)


def by_recipe(name: str, shape: Sequence[int]) -> torch.Tensor:
    """The numbers that the fixtures give to the tensor with this name in a public checkpoint."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    leaf = name.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return torch.zeros(tuple(shape), dtype=torch.int64)
    if leaf == "running_var":
        return torch.from_numpy(random.uniform(0.5, 1.5, shape)).float()
    if leaf == "weight" and len(shape) == 4:
        scale, offset = np.sqrt(2 / np.prod(shape[1:])), 0.0
    elif name == "L2Norm.weight":
        scale, offset = 1.0, 20.0
    else:
        scale, offset = {"weight": (0.1, 1.0), "bias": (0.05, 0.0), "running_mean": (0.1, 0.0)}[leaf]
    return torch.from_numpy(offset + scale * random.standard_normal(shape)).float()


@torch.no_grad()
def _compare_network(fixture: Fixture, network: str, model: SSD, image: torch.Tensor) -> None:
    images = model.preprocess_image([{"image": image}]).tensor
    features = model.backbone(images)
    for index, level in enumerate(model.head_in_features):
        _compare(fixture, f"{network}_source{index}_ch0to3_center", _center(features[level]))
    for part, rows in zip(("conf", "loc"), _rows(model, features)):
        _compare(fixture, f"{network}_{part}", rows[0])
    if f"{network}_adp_center_ch0to3" in fixture.arrays:
        hint = features["s8"] if network == "vggkd" else _adapted(features["s8"])
        _compare(fixture, f"{network}_adp_center_ch0to3", _center(hint))
    if fixture.names(f"{network}_trainmode_*"):
        model.train()
        features = model.backbone(torch.cat([images, images.flip(3)]))
        for part, rows in zip(("conf", "loc"), _rows(model, features)):
            _compare(fixture, f"{network}_trainmode_{part}_img0_every10", rows[0, ::10])


def _rows(model: SSD, features: Weights) -> list[torch.Tensor]:
    """Class logits (N, R, K + 1), with the background first, and deltas (N, R, 4)."""
    levels = [features[name] for name in model.head_in_features]
    outputs = []
    for maps, length in zip(model.head(levels), (model.num_classes + 1, 4)):
        rows = [x.permute(0, 2, 3, 1).reshape(len(x), -1, length) for x in maps]
        outputs.append(torch.cat(rows, dim=1))
    return [outputs[0].roll(1, dims=-1), outputs[1]]


def _adapted(level: torch.Tensor) -> torch.Tensor:
    """Apply the 1x1 convolution for hints, which only the student of the authors has."""
    shape = (512, level.shape[1], 1, 1)
    weight, bias = by_recipe("adaptation.weight", shape), by_recipe("adaptation.bias", shape[:1])
    return F.conv2d(level, weight, bias)


def _center(level: torch.Tensor) -> torch.Tensor:
    """(4, W): the first channels of the middle row."""
    return level[0, :4, level.shape[2] // 2]


def _compare(fixture: Fixture, name: str, actual: torch.Tensor) -> None:
    fixture.compare(name, actual, atol=_PRECISION * max(1.0, float(np.std(fixture[name]))))
