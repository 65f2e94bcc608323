"""Names and order of classes of public checkpoints."""

import json

import pytest
import torch
from detectron2.modeling import build_model
from distill_d2.projects.ssd.names import from_public, name_of
from ssd_case import config

CHECKPOINTS = {
    "ssd300_vgg16_original": "A",
    "vgg16_kd_teacher": "B",
    "mb2_ssd_lite": "C",
    "mb2_ssd_lite_public_qfgaohao": "C",
}


@pytest.fixture
def public(shared):
    """Shapes by names of each checkpoint."""
    recorded = json.loads((shared / "golden" / "ssd_state_dict_keys.json").read_text())["networks"]
    assert list(recorded) == list(CHECKPOINTS)
    return recorded


def shapes_here(checkpoint):
    cfg = config(CHECKPOINTS[checkpoint])
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in build_model(cfg).state_dict().items()}


def converted(shapes):
    with torch.device("meta"):
        return from_public({name: torch.empty(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_every_tensor_has_its_place(public, checkpoint):
    shapes = public[checkpoint]
    weights, dropped, unknown = converted(shapes)
    assert {name: tensor.shape for name, tensor in weights.items()} == shapes_here(checkpoint)
    assert dropped == [name for name in shapes if name.startswith("adaptation.")] and not unknown
    assert len(weights) + len(dropped) == len(shapes)


@pytest.mark.parametrize(
    "public, expected",
    [
        ("vgg.0.weight", "backbone.features.0.weight"),
        ("33.bias", "backbone.features.33.bias"),
        ("L2Norm.weight", "backbone.l2_norm.weight"),
        ("extras.7.bias", "backbone.extras.7.bias"),
        ("loc.5.weight", "head.deltas.5.weight"),
        ("conf.0.bias", "head.logits.0.bias"),
        ("base_net.0.0.weight", "backbone.features.0.0.weight"),
        ("base_net.18.1.running_var", "backbone.features.18.1.running_var"),
        ("base_net.1.conv.3.weight", "backbone.features.1.conv.1.weight"),
        ("base_net.1.conv.4.bias", "backbone.features.1.conv.2.bias"),
        ("base_net.17.conv.0.weight", "backbone.features.17.conv.0.0.weight"),
        ("base_net.2.conv.4.num_batches_tracked", "backbone.features.2.conv.1.1.num_batches_tracked"),
        ("base_net.14.conv.6.weight", "backbone.features.14.conv.2.weight"),
        ("base_net.14.conv.7.running_mean", "backbone.features.14.conv.3.running_mean"),
        ("extras.3.conv.3.weight", "backbone.extras.3.conv.1.0.weight"),
        ("regression_headers.0.1.weight", "head.deltas.0.1.weight"),
        ("classification_headers.4.3.bias", "head.logits.4.3.bias"),
        ("classification_headers.5.weight", "head.logits.5.weight"),
    ],
)
def test_name(public, expected):
    assert name_of(public) == expected


@pytest.mark.parametrize(
    "name",
    [
        *("", "weight", "vgg.weight", "vgg.0.gamma", "features.0.weight", "module.vgg.0.weight"),
        *("base_net.1.conv.6.weight", "base_net.2.conv.2.weight", "L2Norm.0.weight", "loc.a.weight"),
        *("classification_headers.0.2.weight", "regression_headers.0.weights", "fc.bias"),
    ],
)
def test_unknown_names(name):
    assert name_of(name) is None
    tensor = torch.zeros(1)
    weights, dropped, unknown = from_public({"vgg.0.bias": tensor, name: tensor})
    assert list(weights) == ["backbone.features.0.bias"] and not dropped and unknown == [name]


@pytest.mark.parametrize(
    "loc, conf", [("loc.1", "conf.1"), ("regression_headers.5", "classification_headers.5")]
)
def test_background_goes_from_the_first_to_the_last_place(loc, conf):
    """Two prior boxes, and the background with two classes."""
    rows = torch.tensor([0.0, 1, 2, 10, 11, 12])
    boxes = torch.arange(8.0)
    public = {
        f"{conf}.bias": rows,
        f"{conf}.weight": rows.view(6, 1, 1, 1).expand(6, 4, 3, 3),
        f"{loc}.bias": boxes,
        f"{loc}.weight": boxes.view(8, 1, 1, 1),
    }
    weights, _, _ = from_public(public)
    level, expected = conf[-1], torch.tensor([1.0, 2, 0, 11, 12, 10])
    assert torch.equal(weights[f"head.logits.{level}.bias"], expected)
    assert torch.equal(weights[f"head.logits.{level}.weight"][:, 2, 1, 0], expected)
    assert torch.equal(weights[f"head.deltas.{level}.bias"], boxes)
    assert torch.equal(weights[f"head.deltas.{level}.weight"].flatten(), boxes)
    assert public[f"{conf}.bias"] is rows and rows[0] == 0  # the checkpoint's own stays


def test_only_the_last_convolution_of_a_head_has_classes():
    numbers = torch.arange(12.0)
    depthwise, head = numbers.view(12, 1, 1, 1), "classification_headers.0"
    public = {
        f"{head}.0.weight": depthwise,
        f"{head}.1.bias": numbers,
        f"{head}.3.bias": numbers,
        "regression_headers.0.3.bias": torch.zeros(16),
    }
    weights, _, _ = from_public(public)
    assert torch.equal(weights["head.logits.0.0.weight"], depthwise)
    assert weights["head.logits.0.1.bias"].tolist() == list(range(12))
    assert weights["head.logits.0.3.bias"].tolist() == [1, 2, 0, 4, 5, 3, 7, 8, 6, 10, 11, 9]
