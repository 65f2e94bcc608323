"""The three networks: sizes, levels, widths."""

import pytest
import torch
from detectron2.modeling import build_model
from distill_d2.projects.ssd import SSDVGG16, SSDMobileNetV2
from distill_d2.projects.ssd.vgg import L2Norm
from ssd_case import NARROW, NETWORKS, WIDTHS, batch, config, ssd

LEVELS = {
    "A": dict(s8=512, s16=1024, s32=512, s64=256, s100=256, s300=256),
    "B": dict(s8=512, s16=1024, s32=512, s64=256, s100=256, s150=256, s300=256),
    "C": dict(s8=192, s16=576, s32=1280, s64=512, s100=256, s150=256, s300=64),
}
# Parameters and tensors of the public checkpoints, without a convolution that they do not use.
SIZES = {
    "A": (26_285_486, 71),
    "B": (26_826_884 - 512 * 192 - 192, 76 - 2),
    "C": (3_487_044 - 192 * 512 - 512, 478),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_sizes(network):
    cfg = config(network)
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):  # shapes without weights
        model = build_model(cfg)
    parameters = sum(p.numel() for p in model.parameters())
    assert (parameters, len(model.state_dict())) == SIZES[network]
    shapes = model.backbone.output_shape()
    assert {name: shape.channels for name, shape in shapes.items()} == LEVELS[network]
    assert all(shape.stride == int(name[1:]) for name, shape in shapes.items())
    assert model.backbone.size_divisibility == 0


@pytest.mark.parametrize("network", NETWORKS)
def test_levels_and_outputs(network):
    model = ssd(network, NUM_CLASSES=3).eval()
    with torch.no_grad():
        features = model.backbone(torch.zeros(2, 3, 300, 300))
    shapes, full = model.backbone.output_shape(), LEVELS[network]
    assert list(features) == list(shapes) == list(full)
    assert shapes["s8"].channels == NARROW[network] * full["s8"]
    widths = WIDTHS[network] if network == "A" else (38, *WIDTHS[network])
    for (name, feature), width in zip(features.items(), widths):
        assert feature.shape == (2, shapes[name].channels, width, width)
    counts = model.anchor_generator.num_priors
    assert counts == ([4, 6, 6, 6, 4, 4] if network == "A" else [6] * 6)
    for outputs, length in zip(model.head([features[n] for n in model.head_in_features]), (4, 4)):
        assert [tuple(x.shape[1:]) for x in outputs] == [
            (count * length, width, width) for count, width in zip(counts, WIDTHS[network])
        ]


def test_width():
    full, narrow = LEVELS["B"], SSDVGG16(width=0.125).output_shape()
    assert {n: s.channels for n, s in narrow.items()} == {n: c // 8 for n, c in full.items()}
    # Of MobileNetV2, multiples of 8, and its last convolution and the extra ones are not narrowed.
    narrow = {n: s.channels for n, s in SSDMobileNetV2(width=0.5).output_shape().items()}
    assert narrow == {**LEVELS["C"], "s8": 96, "s16": 288}
    assert min(s.channels for s in SSDVGG16(width=1e-3).output_shape().values()) == 1


def test_vgg_starts_from_he_weights():
    backbone = SSDVGG16(width=0.25)
    for layer in (backbone.features[14], backbone.extras[1]):
        expected = (2 / (9 * layer.out_channels)) ** 0.5
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.1)
        assert not layer.bias.any()


def test_l2_norm_by_hand():
    norm = L2Norm(2)
    assert norm.weight.tolist() == [20.0, 20.0]
    norm.weight.data[1] = 5.0
    x = torch.tensor([[3.0, 0.0], [4.0, 2.0]]).view(1, 2, 1, 2)
    expected = torch.tensor([[12.0, 0.0], [4.0, 5.0]]).view(1, 2, 1, 2)
    torch.testing.assert_close(norm(x), expected)


def test_l2_norm_where_all_channels_are_zero():
    """After a ReLU they may be: its gradient there is finite, whatever comes from above."""
    norm, x = L2Norm(3), torch.randn(1, 3, 2, 2)
    x[..., 0, 0] = -1.0
    x.requires_grad_()
    norm(x.relu()).square().sum().backward()
    assert x.grad.isfinite().all() and not x.grad[..., 0, 0].any() and x.grad.any()
    assert norm.weight.grad.isfinite().all()
    x = x.detach().relu()
    torch.testing.assert_close(norm(x.half()), norm(x), rtol=1e-3, atol=1e-3)


def test_layers_that_shapes_do_not_show():
    """The dilated fc6 of the VGG, and the block of MobileNetV2 whose expansion is a level."""
    fc6 = SSDVGG16(width=0.125).features[31]
    assert (fc6.kernel_size, fc6.padding, fc6.dilation) == ((3, 3), (6, 6), (6, 6))
    model, outputs = ssd("C").eval(), []
    model.backbone.features[14].conv[0].register_forward_hook(lambda *parts: outputs.append(parts[2]))
    with torch.no_grad():
        levels = model.backbone(torch.zeros(1, 3, 300, 300))
    assert torch.equal(levels["s16"], outputs[0])


# Levels on any other backbone


def levels_on_a_resnet(strides=(8, 16, 32, 64), size=100):
    cfg = config(STRIDES=list(strides), SIZE=size, NUM_CLASSES=3, EXTRA_CHANNELS=24)
    cfg.MODEL.SSD.MIN_SIZES, cfg.MODEL.SSD.MAX_SIZES = [20.0] * len(strides), [40.0] * len(strides)
    cfg.MODEL.SSD.ASPECT_RATIOS = [[2.0]] * len(strides)
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    node = cfg.MODEL.RESNETS
    node.RES2_OUT_CHANNELS, node.WIDTH_PER_GROUP, node.STEM_OUT_CHANNELS = 16, 4, 8
    node.OUT_FEATURES = ["res3", "res4"]
    torch.manual_seed(0)
    return build_model(cfg)


def test_levels_of_any_backbone():
    """Its stages, whatever their scale, and extra levels; a whole step reaches every parameter."""
    model = levels_on_a_resnet().train()
    shapes = model.backbone.output_shape()
    assert {name: shape.channels for name, shape in shapes.items()} == dict(
        s8=32, s16=64, s32=24, s64=24
    )
    images = batch(2, 1, size=100, classes=3)
    with torch.no_grad():
        x = model.preprocess_image(images).tensor
        stages, maps = model.backbone.bottom_up(x), model.backbone(x)
    assert [level.shape[-1] for level in maps.values()] == [13, 7, 4, 2]
    assert model.backbone.size_divisibility == 0
    for level, stage in (("s8", "res3"), ("s16", "res4")):
        length = stages[stage].square().mean(dim=1, keepdim=True).sqrt()
        torch.testing.assert_close(maps[level], stages[stage] / length)
    sum(model(images).values()).backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad is not None, name


@pytest.mark.parametrize(
    "strides, message",
    [
        ((4, 8, 16), r"\['s4'\] are none of them"),
        ((8, 32), "its last one, s16, is not read"),
        ((16, 64), "that of stride 64 is 4 cells wide, expected 2 of an image of 100 pixels"),
    ],
)
def test_strides_that_another_backbone_does_not_reach(strides, message):
    with pytest.raises(
        ValueError, match=rf"MODEL.SSD.STRIDES is \[{', '.join(map(str, strides))}\].*{message}"
    ):
        levels_on_a_resnet(strides)
