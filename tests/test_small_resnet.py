"""The small backbone of projects/SmallResNet."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
from distill_d2.projects.small_resnet import add_small_resnet_config


def config(**keys):
    cfg = get_cfg()
    add_small_resnet_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_small_resnet_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.FPN.OUT_CHANNELS = 24
    for key, value in keys.items():
        cfg.MODEL.SMALL_RESNET[key] = value
    return cfg


def shapes(backbone, size=(64, 96)):
    features = backbone.eval()(torch.zeros(1, 3, *size))
    return {name: tuple(feature.shape[1:]) for name, feature in features.items()}


def test_default_levels():
    backbone = build_backbone(config())
    assert shapes(backbone) == {"p2": (24, 16, 24), "p3": (24, 8, 12), "p4": (24, 4, 6)}
    strides = {name: shape.stride for name, shape in backbone.output_shape().items()}
    assert strides == {"p2": 4, "p3": 8, "p4": 16}
    assert backbone.size_divisibility == 16


def test_all_stages_and_the_top_block():
    keys = {"OUT_FEATURES": ["res2", "res3", "res4", "res5"], "TOP_BLOCK": True}
    backbone = build_backbone(config(**keys))
    assert shapes(backbone) == {
        "p2": (24, 16, 24),
        "p3": (24, 8, 12),
        "p4": (24, 4, 6),
        "p5": (24, 2, 3),
        "p6": (24, 1, 2),
    }
    assert {name: shape.stride for name, shape in backbone.output_shape().items()}["p6"] == 64


def test_levels_may_start_at_res3():
    backbone = build_backbone(config(OUT_FEATURES=["res3", "res4", "res5"]))
    assert list(shapes(backbone)) == ["p3", "p4", "p5"]


def test_widths_and_blocks():
    keys = {"STEM_WIDTH": 4, "WIDTHS": [6, 10, 12, 14], "BLOCKS": [1, 3, 2, 1]}
    bottom_up = build_backbone(config(**keys)).bottom_up
    assert bottom_up.stem.conv1.weight.shape == (4, 3, 7, 7)
    assert [len(stage) for stage in bottom_up.stages] == [1, 3, 2]  # res5 is not used, so not built
    channels = {name: shape.channels for name, shape in bottom_up.output_shape().items()}
    assert channels == {"res2": 6, "res3": 10, "res4": 12}


@pytest.mark.parametrize("norm, expected", [("BN", torch.nn.BatchNorm2d), ("GN", torch.nn.GroupNorm)])
def test_norm(norm, expected):
    keys = {"NORM": norm, "STEM_WIDTH": 32, "WIDTHS": [32, 64, 96, 64]}
    bottom_up = build_backbone(config(**keys)).bottom_up
    assert isinstance(bottom_up.stem.conv1.norm, expected)
    assert isinstance(bottom_up.res3[0].shortcut.norm, expected)


def test_freeze_at():
    cfg = config()
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    bottom_up = build_backbone(cfg).bottom_up
    frozen = [
        not any(p.requires_grad for p in m.parameters()) for m in (bottom_up.stem, *bottom_up.stages)
    ]
    assert frozen == [True, True, False, False]


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"WIDTHS": [8, 16, 32]}, r"4 WIDTHS and 4 BLOCKS.*got WIDTHS \[8, 16, 32\]"),
        ({"WIDTHS": [8, 16, 16, 32]}, r"WIDTHS is \[8, 16, 16, 32\]; each stage must be wider"),
        ({"BLOCKS": [1, 1]}, r"BLOCKS \[1, 1\]"),
        ({"OUT_FEATURES": ["res2", "res6"]}, r"OUT_FEATURES is \['res2', 'res6'\]; the stages are"),
        ({"OUT_FEATURES": []}, r"OUT_FEATURES is \[\]"),
        ({"TOP_BLOCK": True}, "must contain res5"),
    ],
)
def test_wrong_keys(keys, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(config(**keys))
