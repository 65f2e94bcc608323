"""Backbones of timm: their stages, norms, freezing and pyramids."""

import re
import sys

import pytest
import timm
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_backbone, build_model
from distill_d2.projects.timm_backbone import TimmBackbone
from torch import nn

from distill_d2.rules import check_model
from distill_d2.testing import tiny_config

STAGES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


def config(name="test_efficientnet", stages=("res2", "res3", "res4"), **keys):
    cfg = tiny_config()
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.TIMM.NAME = "build_timm_fpn_backbone", name
    cfg.MODEL.FPN.IN_FEATURES = list(stages)
    for key, value in keys.items():
        cfg.MODEL.TIMM[key] = value
    return cfg


def with_statistics(model):
    """Norms as after a training."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.dim() == 1:
            nn.init.uniform_(tensor, 0.5, 1.5) if "var" in name else nn.init.normal_(tensor, 0.5, 0.3)
    return model


def features_of_timm(model, x, stages):
    """By timm's own means, of the whole model."""
    with torch.no_grad():
        maps = model.eval().forward_intermediates(x, intermediates_only=True)
    strides = [each["reduction"] for each in model.feature_info]
    return {stage: maps[strides.index(STAGES[stage])] for stage in stages}


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
@pytest.mark.parametrize(
    "name, stages",
    [
        ("test_efficientnet", ["res2", "res4"]),
        ("test_resnet", ["res3", "res4", "res5"]),
        ("test_convnext", ["res2", "res3"]),
        ("test_maxvit", ["res3", "res4"]),
        ("mobilenetv4_conv_small", ["res3", "res4"]),
    ],
)
def test_stages_are_timms(name, stages, norm):
    torch.manual_seed(0)
    whole, args = with_statistics(timm.create_model(name)), {}
    backbone = TimmBackbone(name, stages, norm=norm, args=args).eval()
    state = whole.state_dict()
    backbone.body.load_state_dict({key: state[key] for key in backbone.body.state_dict()})
    x = torch.randn(2, 3, 64, 96) if name != "test_maxvit" else torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        found = backbone(x)
    expected = features_of_timm(whole, x, stages)
    assert list(found) == stages == list(backbone.output_shape())
    for stage in stages:
        torch.testing.assert_close(found[stage], expected[stage])
        assert backbone.output_shape()[stage].channels == found[stage].shape[1]
        assert backbone.output_shape()[stage].stride == x.shape[2] // found[stage].shape[2]
    assert len(backbone.body.state_dict()) < len(state)


def test_detectron2s_conversion_would_drop_the_activations():
    """timm's batch norms contain them; the conversion that is used keeps them."""
    torch.manual_seed(0)
    whole, x = with_statistics(timm.create_model("test_efficientnet")), torch.randn(1, 3, 64, 64)
    expected = features_of_timm(whole, x, ["res4"])["res4"]
    dropped = FrozenBatchNorm2d.convert_frozen_batchnorm(timm.create_model("test_efficientnet"))
    dropped.load_state_dict(whole.state_dict(), strict=False)
    assert not torch.allclose(features_of_timm(dropped, x, ["res4"])["res4"], expected, rtol=0.1)
    backbone = TimmBackbone("test_efficientnet", ["res4"]).train()
    backbone.body.load_state_dict(whole.state_dict(), strict=False)
    torch.testing.assert_close(backbone(x)["res4"], expected)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "test_convnext"])
def test_freeze_at_is_by_stride(name):
    """Not trained is what the frozen stages depend on, and nothing else; it is run without gradients."""
    stages = list(STAGES)[:3]
    backbone = TimmBackbone(name, stages, norm="BN").train()
    x = torch.randn(2, 3, 32, 32)
    for freeze_at, stage in enumerate(stages, start=2):
        backbone.zero_grad()
        backbone(x)[stage].sum().backward()
        reached = {key for key, p in backbone.named_parameters() if p.grad is not None}
        frozen = TimmBackbone(name, stages, norm="BN", freeze_at=freeze_at).train()
        trained = {key for key, p in frozen.named_parameters() if p.requires_grad}
        assert trained == {key for key, _ in backbone.named_parameters()} - reached
        before = {key: value.clone() for key, value in frozen.state_dict().items()}
        maps = frozen(x)
        assert not maps[stage].requires_grad
        changed = {k for k, v in frozen.state_dict().items() if not v.equal(before[k])}
        assert bool(changed) == (name != "test_convnext" and stage != stages[-1])
        assert not {key.rpartition(".")[0] for key in changed} & {
            key.rpartition(".")[0] for key in reached
        }
    stem = TimmBackbone(name, stages, norm="BN", freeze_at=1)
    frozen = {key for key, _ in backbone.named_parameters()} - {
        key for key, p in stem.named_parameters() if p.requires_grad
    }
    assert {key.split(".")[1] for key in frozen} <= {"conv_stem", "bn1", "blocks", "conv1", "stem"}
    assert not any(key.startswith(("body.blocks.1", "body.stages", "body.layer1")) for key in frozen)
    assert frozen


@pytest.mark.parametrize(
    "stages, reads, top_block, levels",
    [
        ("res2 res3 res4", "p2 p3 p4", "auto", "p2 p3 p4"),
        ("res3 res4", "p3 p4 p5", "auto", "p3 p4 p5"),
        ("res3 res4", "p3 p4 p5", "maxpool", "p3 p4 p5"),
        ("res3 res4 res5", "p3 p4 p5 p6 p7", "auto", "p3 p4 p5 p6 p7"),
        ("res3 res4 res5", "p3 p4", "auto", "p3 p4 p5"),
        ("res3 res4", "p3 p4 p5 p6", "p6p7", "p3 p4 p5 p6"),
    ],
)
def test_levels_above_the_last(stages, reads, top_block, levels):
    cfg = config(stages=stages.split(), TOP_BLOCK=top_block)
    cfg.MODEL.RETINANET.IN_FEATURES = reads.split()
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16.0]]
    check_model(cfg)
    backbone = build_backbone(cfg).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 128))
    assert " ".join(maps) == levels == " ".join(backbone.output_shape())
    for name, level in maps.items():
        assert (
            level.shape[3]
            == -(-128 // 2 ** int(name[1]))
            == -(-128 // backbone.output_shape()[name].stride)
        )
    if len(maps) == 3 and "p5" in maps and "res5" not in stages:
        assert maps["p5"].equal(maps["p4"][:, :, ::2, ::2])


def test_auto_adds_what_a_two_stage_detector_reads():
    cfg = tiny_config("faster")
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.TIMM.NAME = "build_timm_fpn_backbone", "test_resnet"
    cfg.MODEL.FPN.IN_FEATURES = list(STAGES)
    assert list(build_backbone(cfg).output_shape()) == ["p2", "p3", "p4", "p5", "p6"]


def test_more_stages_for_losses():
    cfg = config(OUT_FEATURES=["res2", "res3", "res4", "res5"])
    assert list(build_backbone(cfg).bottom_up.output_shape()) == list(STAGES)
    cfg.MODEL.BACKBONE.NAME = "build_timm_backbone"
    assert list(build_backbone(cfg).output_shape()) == list(STAGES)


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"name": "resnet_18"}, "MODEL.TIMM.NAME is 'resnet_18'; expected a model of timm"),
        (
            {"name": "visformer_small"},
            "has the stages ['res3', 'res4', 'res5'], of the strides [8, 16, 32]",
        ),
        ({"ARGS": {"width": 3}}, "MODEL.TIMM: timm cannot create 'test_efficientnet'"),
        ({"stages": ["res2", "res4"]}, "MODEL.FPN.IN_FEATURES is ['res2', 'res4']; expected stages"),
        ({"stages": []}, "MODEL.FPN.IN_FEATURES is []; expected stages"),
        ({"OUT_FEATURES": ["res2"]}, "but MODEL.TIMM.OUT_FEATURES is ['res2']; expected all of them"),
        ({"NORM": "GN"}, "MODEL.TIMM.NORM is 'GN'; expected one of ['FrozenBN', 'BN', 'SyncBN']"),
    ],
)
def test_is_refused(keys, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_model(config(**keys))


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    cfg = config()
    check_model(tiny_config())
    with pytest.raises(ImportError, match="pip install 'distill_d2\\[timm\\]'"):
        build_model(cfg)
