"""ViTs of timm as backbones, alone and below a simple pyramid."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone

from distill_d2.engine import build_optimizer
from distill_d2.testing import tiny_config

timm = pytest.importorskip("timm")
from distill_d2.projects.timm_backbone import SimplePyramid, TimmViT

SMALL = {"depth": 4, "embed_dim": 16, "num_heads": 2}


def vit(**arguments):
    torch.manual_seed(0)
    return TimmViT("test_vit", args={**SMALL, **arguments.pop("args", {})}, **arguments).eval()


def of_timm(backbone, **args):
    """timm's own model of one size with the backbone's weights; its position embeddings are resized by timm."""
    model = timm.create_model("test_vit", **SMALL, num_classes=0, **args)
    filtered = timm.models.vision_transformer.checkpoint_filter_fn(
        dict(backbone.body.state_dict()), model, interpolation="bicubic", antialias=True
    )
    model.load_state_dict(filtered)
    return model.eval()


def patches(model, images):
    """(N, channels, rows, columns) of timm's normed tokens."""
    tokens = model.forward_features(images)[:, model.num_prefix_tokens :]
    grid = model.patch_embed.grid_size
    return tokens.transpose(1, 2).unflatten(2, grid)


# One map.


@pytest.mark.parametrize("size", [(160, 160), (64, 96)])
def test_map_is_timms(size):
    backbone, images = vit(), torch.randn(2, 3, *size)
    with torch.no_grad():
        (found,) = backbone(images).values()
        expected = patches(of_timm(backbone, img_size=size), images)
    assert found.shape == (2, 16, size[0] // 16, size[1] // 16)
    torch.testing.assert_close(found, expected)
    assert backbone.output_shape() == {"res4": ShapeSpec(channels=16, stride=16)}
    assert backbone.size_divisibility == 16


def test_patches_of_14_pixels_become_those_of_16():
    """Images are resized, so the map has stride 16, and each patch sees what it sees in the resized image."""
    backbone = vit(args={"patch_size": 14, "img_size": 56})
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        (found,) = backbone(images).values()
        small = F.interpolate(images, size=(56, 84), mode="bilinear")
        expected = patches(of_timm(backbone, patch_size=14, img_size=(56, 84)), small)
    assert backbone.output_shape()["res4"].stride == 16
    torch.testing.assert_close(found, expected)


def test_models_of_one_size_see_zeros_below_and_right():
    backbone = vit(args={"dynamic_img_size": False, "img_size": 96})
    images = torch.randn(1, 3, 64, 80)
    with torch.no_grad():
        (found,) = backbone(images).values()
        whole = patches(of_timm(backbone, img_size=96), F.pad(images, (0, 16, 0, 32)))
    torch.testing.assert_close(found, whole[:, :, :4, :5])
    with pytest.raises(
        ValueError, match="'test_vit' takes images of 96x96 pixels alone.*64x128.*img_size: 128"
    ):
        backbone(torch.randn(1, 3, 64, 128))


@pytest.mark.parametrize(
    "freeze_at, fixed",
    [(0, []), (1, []), (2, [0]), (3, [0, 1]), (4, [0, 1, 2]), (5, [0, 1, 2, 3, "norm"])],
)
def test_freeze_at(freeze_at, fixed):
    """The parts before the blocks, then quarters of the blocks; and nothing that is trained goes unread."""
    backbone = vit(freeze_at=freeze_at)
    (found,) = backbone(torch.randn(2, 3, 32, 48)).values()
    if freeze_at < 5:
        found.square().mean().backward()
    starts = tuple("norm." if each == "norm" else f"blocks.{each}." for each in fixed)
    before = ("patch_embed.", "pos_embed", "cls_token")
    for name, parameter in backbone.body.named_parameters():
        is_fixed = name.startswith(starts) or (freeze_at > 0 and name.startswith(before))
        assert (parameter.requires_grad, parameter.grad is not None) == (not is_fixed, not is_fixed), (
            name
        )


def test_norm_and_stages_that_do_not_do():
    with pytest.raises(
        ValueError, match=r"'test_resnet' has stages of the strides \[2, 4, .*TimmBackbone is"
    ):
        TimmViT("test_resnet")
    with pytest.raises(ValueError, match="'test_vit', of patches of 64 pixels"):
        vit(args={"patch_size": 64, "img_size": 128})


# Below a pyramid.


def config(**keys):
    cfg = tiny_config()
    cfg.MODEL.BACKBONE.NAME = "build_timm_fpn_backbone"
    cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.NORM = ["res3", "res4"], "LN"
    cfg.MODEL.TIMM.NAME = "test_vit"
    cfg.MODEL.TIMM.ARGS = CfgNode({**SMALL, "patch_size": 16})
    cfg.merge_from_list([each for pair in keys.items() for each in pair])
    return cfg


STAGES = ["res2", "res3", "res4", "res5"]


@pytest.mark.parametrize("norm", ["", "LN"])
def test_levels_of_a_simple_pyramid(norm):
    keys = {"MODEL.FPN.IN_FEATURES": STAGES, "MODEL.FPN.NORM": norm, "MODEL.TIMM.TOP_BLOCK": "p6p7"}
    backbone = build_backbone(config(**keys))
    images = torch.randn(1, 3, 64, 96)
    shapes = {name: tuple(level.shape) for name, level in backbone(images).items()}
    sizes = {"p2": (16, 24), "p3": (8, 12), "p4": (4, 6), "p5": (2, 3), "p6": (1, 2), "p7": (1, 1)}
    assert shapes == {name: (1, 16, *size) for name, size in sizes.items()}
    strides = {name: shape.stride for name, shape in backbone.output_shape().items()}
    assert strides == {name: 2 ** int(name[1]) for name in sizes}
    assert backbone.size_divisibility == backbone.padding_constraints["size_divisibility"] == 32
    parts = {name.split(".")[0] for name in backbone.state_dict()}
    assert parts == {"bottom_up", "simfp_2", "simfp_3", "simfp_4", "simfp_5", "top_block"}
    assert "bottom_up.body.blocks.0.attn.qkv.weight" in backbone.state_dict()


def test_levels_are_made_of_the_map_alone():
    """Of stride 16 by its layer alone, of stride 32 of the map's maxima."""
    backbone = build_backbone(config(**{"MODEL.FPN.IN_FEATURES": ["res4", "res5"]})).eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        found = backbone(images)
        (last,) = backbone.bottom_up(images).values()
        torch.testing.assert_close(found["p4"], backbone.simfp_4(last))
        convolutions = backbone.simfp_5[1:]
        torch.testing.assert_close(found["p5"], convolutions(F.max_pool2d(last, 2)))
    assert backbone.size_divisibility == 32


@pytest.mark.parametrize(
    "stages, kind", [(["res4"], TimmViT), (["res3", "res4", "res5"], SimplePyramid)]
)
def test_stages_without_a_pyramid(stages, kind):
    keys = {"MODEL.BACKBONE.NAME": "build_timm_backbone", "MODEL.TIMM.OUT_FEATURES": stages}
    backbone = build_backbone(config(**keys))
    assert type(backbone) is kind and list(backbone.output_shape()) == stages
    shapes = [level.shape[-2:] for level in backbone(torch.randn(1, 3, 64, 64)).values()]
    assert shapes == [(64 // 2 ** int(each[-1]),) * 2 for each in stages]


def test_levels_that_a_map_cannot_give():
    cfg = config(**{"MODEL.FPN.IN_FEATURES": STAGES, "MODEL.TIMM.ARGS.patch_size": 8})
    with pytest.raises(
        ValueError, match=r"'test_vit', whose map has the stride 8, makes \['res2', 'res3', 're"
    ):
        build_backbone(cfg)


def test_layer_decay_reaches_a_pyramids_vit():
    cfg = config(**{"SOLVER.LAYER_DECAY": 0.5, "SOLVER.BACKBONE_LR_FACTOR": 0.5, "SOLVER.BASE_LR": 1.0})
    model = torch.nn.Module()
    model.backbone = build_backbone(cfg)
    groups = build_optimizer(cfg, model).param_groups
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    body, decay = model.backbone.bottom_up.body, cfg.SOLVER.WEIGHT_DECAY
    assert found[id(body.pos_embed)] == (0.5**6, 0.0)
    assert found[id(body.blocks[0].attn.qkv.weight)] == (0.5**5, decay)
    assert found[id(body.blocks[3].attn.qkv.weight)] == (0.5**2, decay)
    assert found[id(model.backbone.simfp_4[0].weight)] == (1.0, decay)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224", "vit_small_patch14_dinov2"),
        *("vit_small_patch16_dinov3", "xcit_nano_12_p16_224", "cait_xxs24_224", "beit_base_patch16_224"),
        *(
            "vit_relpos_small_patch16_224",
            "samvit_base_patch16",
            "vit_small_r26_s32_224",
            "mixer_s32_224",
        ),
    ],
)
def test_kinds_of_timm(name):
    """A map of the right shape, and a gradient for everything."""
    backbone = TimmViT(name)
    ((stage, shape),) = backbone.output_shape().items()
    found = backbone(torch.randn(1, 3, 192, 96))[stage]
    assert found.shape == (1, shape.channels, 192 // shape.stride, 96 // shape.stride)
    (found * torch.randn_like(found)).sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.body.parameters())
