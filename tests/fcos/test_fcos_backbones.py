"""The backbones: names and shapes of the published models, what they compute, and what is refused."""

import json
import re

import naive_fcos as naive
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from distill_d2.projects.fcos import DLA34
from distill_d2.projects.fcos.bifpn import BiFPN, TopLevels
from distill_d2.projects.fcos.deformable import DFConv2d
from distill_d2.projects.fcos.names import to_detectron2
from torch import nn

from distill_d2 import add_distill_config
from distill_d2.config import load_yaml
from distill_d2.model_zoo import get_config_file
from distill_d2.teacher.prepare import fold_norms
from distill_d2.views import build_view
from distill_d2.views.probe import level_shapes

RESNET = "build_fcos_resnet_fpn_backbone"
BIFPN = "build_fcos_resnet_bifpn_backbone"
DLA = "build_fcos_dla_fpn_backbone"


def packaged(name):
    cfg = get_cfg()
    add_distill_config(cfg)
    load_yaml(cfg, get_config_file(name))
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def shapes_of(cfg):
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):  # shapes without weights
        return {name: list(tensor.shape) for name, tensor in build_model(cfg).state_dict().items()}


def small(name=RESNET, *options):
    cfg = packaged("FCOS-Detection/R_50_1x.yaml")
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.FCOS.NORM = name, "none"
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.BiFPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.BiFPN.OUT_CHANNELS = 16
    cfg.MODEL.BiFPN.NUM_REPEATS = 2
    if name == DLA:
        cfg.MODEL.FPN.IN_FEATURES = ["stage3", "stage4", "stage5"]
    cfg.merge_from_list([f"MODEL.{o}" if i % 2 == 0 else o for i, o in enumerate(options)])
    return cfg


def run(backbone):
    return backbone(torch.randn(1, 3, 64, 96))


# Names and shapes of the published models


@pytest.fixture
def published(shared):
    return json.loads((shared / "golden" / "adet_state_dict_keys.json").read_text())


def test_names_and_shapes(published):
    models = [name for name in published if name.startswith("FCOS")]
    assert len(models) == 7
    for name in models:
        found = shapes_of(packaged(published[name]["config"]))
        assert found == published[name]["state_dict"], name


def test_names_and_shapes_of_detectron2s_own(published):
    cfg = packaged("FCOS-Detection/R_50_1x.yaml")
    cfg.MODEL.FCOS.USE_SCALE = False
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes_of(cfg).items()}
    found = {name: list(tensor.shape) for name, tensor in to_detectron2(weights).items()}
    assert found == published["detectron2_fcos_R_50_FPN_1x"]["state_dict"]


# The ordinary pyramid


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_top_levels(levels):
    backbone = build_backbone(small(RESNET, "FCOS.TOP_LEVELS", levels))
    found = run(backbone)
    names, sizes = ["p3", "p4", "p5", "p6", "p7"], [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
    assert list(found) == names[: 3 + levels] and backbone.size_divisibility == 32
    assert [tuple(x.shape[2:]) for x in found.values()] == sizes[: 3 + levels]
    assert {name: shape.stride for name, shape in backbone.output_shape().items()} == {
        f"p{i}": 2**i for i in range(3, 6 + levels)
    }
    for previous, name in (("p5", "p6"), ("p6", "p7"))[:levels]:
        layer = getattr(backbone.top_block, name)
        x = found[previous] if name == "p6" else F.relu(found[previous])
        torch.testing.assert_close(found[name], layer(x))


# BiFPN


def test_bifpn_by_hand():
    """One round over five levels of which one has other channels, node by node."""
    torch.manual_seed(0)
    bottom_up = TopLevels(_Stages([6, 4, 4]), ["a", "b", "c"], 4, 2, "")
    neck = BiFPN(bottom_up, 4, 1)
    for parameter in neck.parameters():
        nn.init.normal_(parameter, std=0.5)
    (layer,) = neck.repeated_bifpn
    x = torch.randn(1, 3, 80, 48)
    c = list(bottom_up(x).values())
    assert [tuple(level.shape[2:]) for level in c] == [(10, 6), (5, 3), (3, 2), (2, 1), (1, 1)]
    c[0] = F.conv2d(c[0], layer.lateral_0_f0.weight, layer.lateral_0_f0.bias)

    def node(name, *inputs):
        weights = getattr(layer, f"weights_{name}").clamp(min=0)
        mixed = sum(w * value for w, value in zip(weights / (weights.sum() + 1e-4), inputs))
        output = getattr(layer, f"outputs_{name}")
        return F.conv2d(mixed * mixed.sigmoid(), output.weight, output.bias, padding=1)

    def up(value, like):
        rows, columns = ((torch.arange(n) * m) // n for n, m in zip(like.shape[2:], value.shape[2:]))
        return value[:, :, rows][:, :, :, columns]

    def down(value):
        return F.max_pool2d(F.pad(value, (1, 1, 1, 1), value=-torch.inf), 3, 2)

    n5 = node("f3_3_4", c[3], up(c[4], c[3]))
    n6 = node("f2_2_5", c[2], up(n5, c[2]))
    n7 = node("f1_1_6", c[1], up(n6, c[1]))
    n8 = node("f0_0_7", c[0], up(n7, c[0]))
    n9 = node("f1_1_7_8", c[1], n7, down(n8))
    n10 = node("f2_2_6_9", c[2], n6, down(n9))
    n11 = node("f3_3_5_10", c[3], n5, down(n10))
    n12 = node("f4_4_11", c[4], down(n11))
    found = neck(x)
    assert list(found) == ["p3", "p4", "p5", "p6", "p7"]
    for actual, expected in zip(found.values(), (n8, n9, n10, n11, n12)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert "repeated_bifpn.0.lateral_1_f1.weight" not in neck.state_dict()


class _Stages(nn.Module):
    """Stages of strides 8, 16 and 32 with these channels."""

    def __init__(self, channels):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, c, 1) for c in channels)

    def output_shape(self):
        names = zip("abc", self.convs, (8, 16, 32))
        return {name: ShapeSpec(channels=conv.out_channels, stride=s) for name, conv, s in names}

    def forward(self, x):
        pooled = (F.avg_pool2d(x, s, ceil_mode=True) for s in (8, 16, 32))
        return {name: conv(y) for name, conv, y in zip("abc", self.convs, pooled)}


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_bifpn_backbone(levels):
    """Its stages are there for losses, too."""
    names = [f"p{i}" for i in range(3, 6 + levels)]
    keys = ("FCOS.IN_FEATURES", names, "FCOS.FPN_STRIDES", [8, 16, 32, 64, 128][: 3 + levels])
    keys += ("FCOS.SIZES_OF_INTEREST", [64, 128, 256, 512][: 2 + levels])
    model = build_model(small(BIFPN, "FCOS.TOP_LEVELS", levels, *keys))
    view = build_view(model, "student")
    stages = [f"res{i}" for i in range(3, 6 + levels)]
    assert list(view.stage_shapes) == stages
    strides = [view.require_level(name).stride for name in stages]
    assert strides == [view.strides[name] for name in names] == [8, 16, 32, 64, 128][: 3 + levels]
    shapes = level_shapes(view, 96, 160)
    assert shapes["res5"] == (128, 3, 5)
    for stage, name, stride in zip(stages, names, strides):
        assert shapes[name] == (16, -(-96 // stride), -(-160 // stride))
        assert shapes[stage][1:] == shapes[name][1:]
    backbone = model.backbone
    assert list(backbone.output_shape()) == names and backbone.size_divisibility == 32
    sum(x.sum() for x in run(backbone).values()).backward()
    assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad)


# DLA


def test_dla_by_hand():
    """Every stage from the tensors of its state_dict alone."""
    torch.manual_seed(0)
    model = DLA34(["stage2", "stage3", "stage4", "stage5"], "BN").eval()
    state = model.state_dict()
    for tensor in state.values():
        if tensor.dim() == 1:
            nn.init.uniform_(tensor, 0.5, 1.5)

    def conv(x, name, norm, stride=1, relu=True):
        weight = state[f"{name}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        parts = [state[f"{norm}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")]
        x = F.batch_norm(x, *parts)
        return F.relu(x) if relu else x

    def block(x, name, residual, stride=1):
        y = conv(x, f"{name}.conv1", f"{name}.bn1", stride)
        return F.relu(conv(y, f"{name}.conv2", f"{name}.bn2", relu=False) + residual)

    def pair(x, name, stride, earlier=()):
        """Two blocks and their root."""
        pooled = F.max_pool2d(x, stride) if stride > 1 else x
        if f"{name}.project.0.weight" in state:
            residual = conv(pooled, f"{name}.project.0", f"{name}.project.1", relu=False)
        else:
            residual = pooled
        first = block(x, f"{name}.tree1", residual, stride)
        second = block(first, f"{name}.tree2", first)
        nodes = torch.cat([second, first, *earlier], dim=1)
        return conv(nodes, f"{name}.root.conv", f"{name}.root.bn")

    def two_pairs(x, name):
        pooled = F.max_pool2d(x, 2)
        first = pair(x, f"{name}.tree1", 2)
        return pair(first, f"{name}.tree2", 1, (pooled, first))

    x = torch.randn(1, 3, 64, 32)
    y = conv(x, "base_layer.0", "base_layer.1")
    y = conv(conv(y, "level0.0", "level0.1"), "level1.0", "level1.1", 2)
    stage2 = pair(y, "level2", 2)
    stage3 = two_pairs(stage2, "level3")
    stage4 = two_pairs(stage3, "level4")
    stage5 = pair(stage4, "level5", 2, (F.max_pool2d(stage4, 2),))
    found = model(x)
    for name, expected in zip(found, (stage2, stage3, stage4, stage5)):
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-3)
    assert found["stage5"].shape == (1, 512, 2, 1) and found["stage5"].std() > 0.1


def test_all_that_is_trained_of_dla_gets_a_gradient():
    backbone = build_backbone(small(DLA, "DLA.NORM", "BN")).train()
    sum(x.sum() for x in run(backbone).values()).backward()
    idle = [name for name, p in backbone.named_parameters() if p.grad is None]
    assert {name.rpartition(".project.")[0] for name in idle} == {"bottom_up.level3", "bottom_up.level4"}
    assert not any(dict(backbone.named_parameters())[name].requires_grad for name in idle)
    assert backbone.output_shape()["p7"].stride == 128


# Deformable convolutions


def deform(stages, modulated=True):
    return ("RESNETS.DEFORM_ON_PER_STAGE", stages, "RESNETS.DEFORM_MODULATED", modulated)


def test_deformable_convolution_by_loops():
    torch.manual_seed(0)
    layer = DFConv2d(2, 3)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.6)
    x = torch.randn(1, 2, 4, 5)
    predicted = F.conv2d(x, layer.offset.weight, layer.offset.bias, padding=1)[0].detach().double()
    expected = naive.deform_conv(
        *(x[0].double().numpy(), predicted[:18].numpy(), predicted[18:].sigmoid().numpy()),
        *(p.detach().double().numpy() for p in (layer.conv.weight, layer.conv.bias)),
    )
    np.testing.assert_allclose(layer(x)[0].detach(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("modulated", [False, True])
def test_deformable_stages_start_as_ordinary_ones(modulated):
    """All offsets are 0, and all masks 0.5."""
    options = deform([False, True, False, True], modulated)
    deformable = build_backbone(small(RESNET, *options)).eval()
    plain = build_backbone(small()).eval()
    state = deformable.state_dict()
    assert {name.split(".")[1] for name in state if "offset" in name} == {"res3", "res5"}
    assert state["bottom_up.res3.0.conv2_offset.weight"].shape[0] == (27 if modulated else 18)
    for name, tensor in state.items():
        if modulated and ".conv2.weight" in name and ("res3" in name or "res5" in name):
            tensor = 0.5 * tensor
        if "offset" not in name:
            plain.state_dict()[name].copy_(tensor)
    x = torch.randn(1, 3, 64, 96)
    found, expected = deformable(x), plain(x)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4)


def test_deformable_stages_train_and_freeze():
    cfg = small(RESNET, *deform([True] * 4), "RESNETS.NUM_GROUPS", 2, "RESNETS.DEFORM_NUM_GROUPS", 2)
    backbone = build_backbone(cfg)
    frozen = {name for name, p in backbone.named_parameters() if not p.requires_grad}
    assert any("res2.0.conv2_offset" in name for name in frozen)
    assert all(name.startswith(("bottom_up.stem", "bottom_up.res2")) for name in frozen)
    sum(x.sum() for x in run(backbone).values()).backward()
    assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad)


def test_folded_norms_compute_the_same():
    backbone = build_backbone(small(RESNET, *deform([False, True, True, True]))).eval()
    for name, tensor in backbone.state_dict().items():
        if "norm" in name:
            nn.init.uniform_(tensor, 0.5, 1.0)
        if "offset" in name:
            nn.init.normal_(tensor, std=0.1)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = backbone(x)
        assert fold_norms(backbone) == 53  # all of a ResNet-50
        after = backbone(x)
    for name in before:
        torch.testing.assert_close(before[name], after[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_deformable_convolution_under_autocast(kind):
    layer = DFConv2d(4, 4)
    x = torch.randn(1, 4, 6, 6)
    with torch.autocast("cpu", dtype=kind):
        found = layer(x.to(kind))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, layer(x), rtol=0.05, atol=0.05)


# What is refused


@pytest.mark.parametrize(
    "name, key, value, message",
    [
        (RESNET, "MOBILENET", True, "; the FCOS backbones here support False"),
        (BIFPN, "BACKBONE.ANTI_ALIAS", True, "; the FCOS backbones here support False"),
        (DLA, "RESNETS.DEFORM_INTERVAL", 3, "; the FCOS backbones here support 1"),
        (RESNET, "FCOS.TOP_LEVELS", 3, "; the FCOS backbones here support 0 or 1 or 2"),
        (DLA, "DLA.CONV_BODY", "DLA60", "; expected 'DLA34'"),
        (DLA, "DLA.OUT_FEATURES", ["level3"], "; expected some of ['stage2', "),
        (RESNET, "FPN.IN_FEATURES", ["res3", "p4"], ", but the bottom-up network returns ['res3', "),
        (RESNET, "FCOS.NORM", "LN", "; expected one of ['GN', 'NaiveGN', "),
        (RESNET, "FCOS.NORM", "GN", ", with 32 groups, but the levels have 16 channels; expected a "),
        (RESNET, "FCOS.IN_FEATURES", ["p3", "p9"], ", but the backbone has the levels ['p3', "),
        (RESNET, "FCOS.IN_FEATURES", [], ", but the backbone has the levels ['p3', "),
        (
            RESNET,
            "FCOS.FPN_STRIDES",
            [4, 8],
            ", but ['p3', 'p4', 'p5', 'p6', 'p7'] have the strides [8, ",
        ),
        (RESNET, "FCOS.SIZES_OF_INTEREST", [64], "; expected 4 rising distances in pixels, "),
        (RESNET, "FCOS.SIZES_OF_INTEREST", [64, 32, 128, 256], "; expected 4 rising distances in "),
        (RESNET, "FCOS.LOC_LOSS_TYPE", "diou", "; expected one of ['giou', "),
        (RESNET, "FCOS.BOX_QUALITY", "area", "; expected one of ['ctrness', 'iou']"),
        (RESNET, "FCOS.LOSS_NORMALIZER_CLS", "bg", "; expected one of ['fg', "),
    ],
)
def test_values_that_are_refused(name, key, value, message):
    with pytest.raises(ValueError, match=re.escape(f"MODEL.{key} is {value!r}{message}")):
        build_model(small(name, key, value))


@pytest.mark.parametrize(
    "name, keys, message",
    [
        (BIFPN, {"BiFPN.IN_FEATURES": ["res3", "res5"]}, r"TOP_LEVELS give levels of strides \[8, 32"),
        (RESNET, {"FPN.IN_FEATURES": ["res3", "res4"]}, r"p6 comes from p5, .* res4, has stride 16"),
        (
            RESNET,
            {"RESNETS.DEPTH": 34, "RESNETS.DEFORM_ON_PER_STAGE": [False, False, True, True]},
            r"only bottleneck blocks \(DEPTH 50, 101 or 152\) can be deformable",
        ),
    ],
)
def test_combinations_that_are_refused(name, keys, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(small(name, *(part for pair in keys.items() for part in pair)))
