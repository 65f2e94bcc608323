"""The bottleneck of projects/GHND: the stage, backbones that have it, its quantizer, its evaluator."""

import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.config import get_cfg, instantiate
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone
from detectron2.modeling.backbone import Backbone
from detectron2.utils import comm
from distill_d2.projects.ghnd import BottleneckStage, inject_bottleneck
from distill_d2.projects.ghnd.evaluator import TransmittedBytes
from distill_d2.projects.ghnd.quantizer import quantize, rounded
from torch import nn

from distill_d2 import add_distill_config

# The stage


def random_stage(*arguments, **options):
    """With norms that do something, in evaluation too."""
    stage = BottleneckStage(*arguments, **options)
    for name, tensor in stage.state_dict().items():
        if tensor.dim() == 1:
            low, high = (0.5, 1.5) if name.endswith(("weight", "var")) else (-0.5, 0.5)
            tensor.uniform_(low, high)
    return stage


def by_hand(stage, x):
    """What the stage sends and returns, by numpy in float64."""
    state = {name: tensor.double().numpy() for name, tensor in stage.state_dict().items()}
    steps = "convolve norm convolve norm relu convolve norm convolve"
    sent = _by_hand(x.numpy(), state, "encoder", steps, 1, stage.training)
    steps = "norm relu convolve norm convolve norm relu convolve norm convolve norm relu"
    return sent, _by_hand(sent, state, "decoder", steps, 0, stage.training)


def _by_hand(x, state, part, steps, padding, training):
    for index, step in enumerate(steps.split()):
        key = f"{part}.{index}"
        if step == "relu":
            x = np.maximum(x, 0)
        elif step == "convolve":
            assert f"{key}.bias" not in state
            x = _convolve(x, state[f"{key}.weight"], padding)
        else:
            mean, variance = state[f"{key}.running_mean"], state[f"{key}.running_var"]
            if training:
                mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3))
            scale, offset = state[f"{key}.weight"] / np.sqrt(variance + 1e-5), state[f"{key}.bias"]
            x = (x - mean[:, None, None]) * scale[:, None, None] + offset[:, None, None]
    return x


def _convolve(x, weight, padding):
    """A kernel of 2x2: four products, each of a shifted map."""
    x = np.pad(x, [(0, 0), (0, 0), (padding, padding), (padding, padding)])
    height, width = x.shape[2] - 1, x.shape[3] - 1
    return sum(
        np.einsum("oi,nihw->nohw", weight[:, :, dy, dx], x[:, :, dy : dy + height, dx : dx + width])
        for dy in (0, 1)
        for dx in (0, 1)
    )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (7, 9), (1, 5)])
@pytest.mark.parametrize(
    "channels, options",
    [
        ((64, 256), {}),
        ((64, 64, 5), {}),
        ((8, 12, 1), {"encoder_widths": (6, 10, 7), "decoder_widths": [9, 11]}),
    ],
)
def test_by_hand(channels, options, size, training):
    stage = random_stage(*channels, **options).double().train(training)
    x, sent = torch.randn(2, channels[0], *size).double(), []
    expected_sent, expected = by_hand(stage, x)
    stage.encoder.register_forward_hook(lambda _module, _inputs, output: sent.append(output))
    out = stage(x)
    assert out.shape == (2, channels[1], *size) and out.min() >= 0 and out.max() > 0
    assert sent[0].shape == (2, (*channels, 3)[2], size[0] + 4, size[1] + 4)
    np.testing.assert_allclose(sent[0].detach().numpy(), expected_sent, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(out.detach().numpy(), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("channels, count", [((64, 256), 577158), ((64, 64), 232326)])
def test_number_of_parameters(channels, count):
    assert sum(p.numel() for p in BottleneckStage(*channels).parameters()) == count


def test_keys_are_those_of_released_checkpoints():
    kernels = {"encoder": (0, 2, 5, 7), "decoder": (2, 4, 7, 9)}
    norms = {"encoder": (1, 3, 6), "decoder": (0, 3, 5, 8, 10)}
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {f"{half}.{index}.weight" for half in kernels for index in kernels[half]}
    expected |= {f"{half}.{index}.{part}" for half in norms for index in norms[half] for part in parts}
    assert set(BottleneckStage(64, 256).state_dict()) == expected


# In a backbone


def config(**keys):
    """Of a student with a bottleneck; keys are paths below MODEL with "__" for a dot."""
    cfg = get_cfg()
    add_distill_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_bottleneck_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    for key, value in keys.items():
        cfg.merge_from_list(["MODEL." + key.replace("__", "."), value])
    return cfg


SMALL = {"BOTTLENECK__BACKBONE": "build_small_resnet_backbone"}
NARROW = {"RESNETS__STEM_OUT_CHANNELS": 16, "RESNETS__WIDTH_PER_GROUP": 8, "FPN__OUT_CHANNELS": 16}
BASIC = {**NARROW, "RESNETS__STEM_OUT_CHANNELS": 64, "RESNETS__RES2_OUT_CHANNELS": 64}
PLAIN = {**NARROW, "BOTTLENECK__BACKBONE": "build_resnet_backbone"}
RETINANET = {"FPN__IN_FEATURES": ["res3", "res4", "res5"]}
RETINANET["BOTTLENECK__BACKBONE"] = "build_retinanet_resnet_fpn_backbone"
BACKBONES = {
    "R50": {},
    "R18": {**BASIC, "RESNETS__DEPTH": 18},
    "RetinaNet": {**NARROW, **RETINANET},
    "C4": {**PLAIN, "RESNETS__OUT_FEATURES": ["res4"]},
    "first stage": {**PLAIN, "RESNETS__OUT_FEATURES": ["stem", "res2"]},
    "small": SMALL,
}


@pytest.mark.parametrize("name", BACKBONES)
def test_stands_in_for_the_first_stage(name):
    cfg = config(**BACKBONES[name])
    backbone = build_backbone(cfg).eval()
    cfg.MODEL.BACKBONE.NAME = cfg.MODEL.BOTTLENECK.BACKBONE
    plain = build_backbone(cfg).eval()
    resnet = getattr(backbone, "bottom_up", backbone)
    assert type(resnet.res2) is BottleneckStage and resnet.stages[0] is resnet.res2
    assert backbone.output_shape() == plain.output_shape()
    assert backbone.size_divisibility == plain.size_divisibility

    def outside(model):
        return {n: t.shape for n, t in model.state_dict().items() if ".res2." not in f".{n}"}

    assert outside(backbone) == outside(plain) and outside(plain)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        found, expected = backbone(x), plain(x)
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in expected.items()}
    assert resnet.res2.transmitted == (1, 3, 20, 28)


@pytest.mark.parametrize("name", ["FrozenBN", "GN", "SyncBN"])
def test_norms_are_ordinary_ones(name):
    resnet = build_backbone(config(RESNETS__NORM=name, RESNETS__DEPTH=18, **BASIC)).bottom_up
    norms = [module for module in resnet.res2.modules() if "Norm" in type(module).__name__]
    assert [type(norm) for norm in norms] == [nn.BatchNorm2d] * 8
    assert type(resnet.res3[0].conv1.norm) is not nn.BatchNorm2d
    assert all(parameter.requires_grad for parameter in resnet.res2.parameters())


@pytest.mark.parametrize("freeze_at, trained", [(0, 4), (1, 3), (2, 3), (3, 2)])
def test_freeze_at_leaves_out_the_bottleneck(freeze_at, trained):
    resnet = build_backbone(config(BACKBONE__FREEZE_AT=freeze_at, **SMALL)).bottom_up
    parts = {name: getattr(resnet, name) for name in ("stem", "res2", "res3", "res4")}
    found = {name: {p.requires_grad for p in part.parameters()} for name, part in parts.items()}
    order = ["res2", "res4", "res3", "stem"]  # the last is frozen first
    assert found == {name: {order.index(name) < trained} for name in parts}
    assert type(resnet.res2.encoder[1]) is nn.BatchNorm2d
    assert all(module.training for module in resnet.train().res2.modules())


class _NoResNet(Backbone):
    def __init__(self, _cfg, _input_shape):
        super().__init__()

    def forward(self, x):
        return {}


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"BACKBONE": "build_resnet"}, "BACKBONE is 'build_resnet'; expected a registered backbone"),
        ({"BACKBONE": "build_bottleneck_backbone"}, "BACKBONE is 'build_bottleneck_backbone'; expected"),
        ({"BACKBONE": "build_other"}, "BACKBONE builds a _NoResNet; .* of a detectron2 ResNet"),
        ({"CHANNELS": 0}, r"CHANNELS is \[0\]; expected 1 "),
        ({"ENCODER_WIDTHS": [64, 256]}, r"ENCODER_WIDTHS is \[64, 256\]; expected 3 "),
        ({"ENCODER_WIDTHS": []}, r"ENCODER_WIDTHS is \[\]; expected 3 "),
        ({"ENCODER_WIDTHS": [64, 0, 64]}, r"ENCODER_WIDTHS is \[64, 0, 64\].* at least 1"),
        ({"DECODER_WIDTHS": [64, 128, 256]}, r"DECODER_WIDTHS is \[64, 128, 256\]; expected 2 "),
        ({"QUANT_BITS": 4}, "QUANT_BITS is 4; expected 8, 16, or 0"),
    ],
)
def test_wrong_keys(monkeypatch, keys, message):
    monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, "build_other", _NoResNet)
    cfg = config(**{**SMALL, **{f"BOTTLENECK__{key}": value for key, value in keys.items()}})
    with pytest.raises((TypeError, ValueError), match=r"MODEL\.BOTTLENECK\." + message):
        build_backbone(cfg)


def test_keys_reach_the_stage():
    keys = {"CHANNELS": 2, "ENCODER_WIDTHS": [4, 5, 6], "DECODER_WIDTHS": [7, 8]}
    keys.update(QUANT_BITS=8, REFERENCE_BUGS=True)
    cfg = config(**SMALL, **{f"BOTTLENECK__{key}": value for key, value in keys.items()})
    stage = build_backbone(cfg).bottom_up.res2
    widths = [m.out_channels for m in stage.modules() if isinstance(m, nn.Conv2d)]
    assert widths == [4, 5, 6, 2, 7, 8, 16, 16]
    assert stage.quant_bits == 8 and stage.reference_bugs


def test_lazy_config():
    model = model_zoo.get_config("common/models/retinanet.py").model
    model.backbone = L(inject_bottleneck)(backbone=model.backbone, channels=4, quant_bits=16)
    backbone = instantiate(model.backbone)
    stage = backbone.bottom_up.res2
    assert type(stage) is BottleneckStage and stage.quant_bits == 16
    assert stage.encoder[7].out_channels == 4
    with torch.no_grad():
        assert backbone.eval()(torch.zeros(1, 3, 64, 64))["p3"].shape == (1, 256, 8, 8)


# The quantizer


KINDS = {
    "mixed": lambda x: x,
    "positive": lambda x: x.abs() + 2,
    "negative": lambda x: -(x.abs()) - 0.1,
    "far": lambda x: x + 1000,
    "constant": lambda x: torch.full_like(x, x[0, 0, 0, 0].item()),
    "zero": lambda x: torch.zeros_like(x),
    "tiny": lambda x: x * 1e-12,
    "huge": lambda x: x * 1e12,
    "one number is 0": lambda x: x * (torch.arange(x.numel()).view_as(x) % 5 > 0),
    "nearly of one sign": lambda x: x.abs() - 1e-3,
}


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_step_at_most(kind):
    """And 0 stays 0."""
    random = np.random.default_rng(0)
    for _ in range(20):
        shape = tuple(random.integers(1, 6, 4))
        numbers = random.normal(size=shape) * random.uniform(0.1, 10, (shape[0], 1, 1, 1))
        tensor = KINDS[kind](torch.tensor(numbers).float())
        found = quantize(tensor)
        assert found.values.dtype == torch.uint8
        assert found.scale.shape == found.zero_point.shape == (shape[0], 1, 1, 1)
        ends = tensor.amin((1, 2, 3)).clamp(max=0), tensor.amax((1, 2, 3)).clamp(min=0)
        span = (ends[1] - ends[0]).view(-1, 1, 1, 1)
        assert (found.scale <= span / 255 * (1 + 1e-6)).all() or kind == "zero"
        assert torch.equal(found.zero_point, found.zero_point.round().clamp(0, 255))
        error = (found.dequantize().double() - tensor.double()).abs()
        rounding = 2e-7 * tensor.abs().double()
        assert (error <= found.scale.double() / 2 * (1 + 1e-5) + rounding).all()
        assert not found.dequantize()[tensor == 0].any()


@pytest.mark.parametrize("constant", [255.0, -255.0, 1.0, -0.1, 3.7e-9, -4e18])
def test_constants_return(constant):
    """Within the rounding of a division and a product by 255."""
    tensor = torch.full((2, 3, 4, 5), constant)
    torch.testing.assert_close(quantize(tensor).dequantize(), tensor, rtol=1.2e-7, atol=0)


def test_images_do_not_depend_on_each_other():
    images = torch.randn(3, 2, 4, 4) * torch.tensor([1.0, 50.0, 0.01]).view(3, 1, 1, 1)
    together = rounded(images, 8)
    for index in range(3):
        assert torch.equal(together[index : index + 1], rounded(images[index : index + 1], 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bfloat16])
def test_rounded(dtype):
    """By float32's numbers."""
    tensor = torch.randn(2, 3, 4, 4).to(dtype)
    assert rounded(tensor, 0) is tensor
    assert torch.equal(rounded(tensor, 16), tensor.half().to(dtype))
    found = quantize(tensor)
    assert found.scale.dtype == found.dequantize().dtype == torch.float32
    assert all(torch.equal(*parts) for parts in zip(found, quantize(tensor.float())))
    assert torch.equal(rounded(tensor, 8), found.dequantize().to(dtype))
    bugs = quantize(tensor, reference_bugs=True).dequantize().to(dtype)
    assert torch.equal(rounded(tensor, 8, reference_bugs=True), bugs)
    assert not torch.equal(rounded(tensor, 8), bugs)


def test_reference_bugs_by_hand():
    """One range for both images, that of their numbers alone; tests/test_golden.py has recorded ones."""
    positive = quantize(torch.tensor([[10.0, 11.0], [11.5, 12.0]]), reference_bugs=True)
    assert positive.scale.item() == pytest.approx(2 / 255) and positive.zero_point.item() == 0
    assert positive.values.tolist() == [[255, 255], [255, 255]]
    torch.testing.assert_close(positive.dequantize(), torch.full((2, 2), 2.0))
    # 63.75 is truncated to 63: the largest number is 254.25 and not the last level.
    mixed = quantize(torch.tensor([[-1.0], [3.0]]), reference_bugs=True)
    assert mixed.zero_point.item() == 63 and mixed.values.tolist() == [[0], [254]]
    assert not quantize(torch.full((1, 4), 5.0), reference_bugs=True).dequantize().any()
    assert quantize(torch.zeros(1, 4), reference_bugs=True).dequantize().isnan().all()


@pytest.mark.parametrize("bits, bugs", [(0, False), (8, False), (8, True), (16, False)])
def test_quantized_in_evaluation_alone(bits, bugs):
    stage = random_stage(8, 12, quant_bits=bits, reference_bugs=bugs)
    plain = BottleneckStage(8, 12)
    plain.load_state_dict(stage.state_dict())
    x = torch.randn(2, 8, 6, 7) * torch.tensor([1.0, 5.0]).view(2, 1, 1, 1)
    assert torch.equal(stage.train()(x), plain.train()(x)) and stage.transmitted is None
    stage.eval(), plain.eval()
    with torch.no_grad():
        sent = plain.encoder(x)
        arrived = {0: sent, 8: quantize(sent, reference_bugs=bugs).dequantize(), 16: sent.half().float()}
        assert torch.equal(stage(x), plain.decoder(arrived[bits]))
        assert torch.equal(stage(x), plain(x)) == (bits == 0)
    assert stage.transmitted == (2, 3, 10, 11)


# The evaluator


@pytest.fixture
def stage():
    return BottleneckStage(8, 12, 5).eval()


@pytest.mark.parametrize(
    "batches, numbers",
    [
        ([], 0),
        ([(1, 16, 24)], 5 * 20 * 28),
        ([(1, 16, 24), (1, 8, 8)], 5 * (20 * 28 + 12 * 12) / 2),
        ([(3, 16, 24), (1, 8, 8)], 5 * (3 * 20 * 28 + 12 * 12) / 4),
    ],
)
def test_bytes_per_image(stage, batches, numbers):
    """The mean over images of different sizes; each evaluation starts anew."""
    evaluator = stage.evaluator()
    for _ in range(2):
        evaluator.reset()
        for images, height, width in batches:
            stage(torch.zeros(images, 8, height, width))
            evaluator.process([{}] * images, None)
        found = evaluator.evaluate()["bytes_per_image"]
        assert found == {"raw": 4 * numbers, "16bit": 2 * numbers, "8bit": numbers}


def test_bytes_of_two_processes(stage, monkeypatch):
    """The mean is over all images, not over processes."""
    evaluators = [TransmittedBytes(stage) for _ in range(2)]
    for evaluator, images in zip(evaluators, (1, 3)):
        stage(torch.zeros(images, 8, images, 1))
        evaluator.process([{}] * images, None)
    sent = []
    monkeypatch.setattr(comm, "gather", lambda data, dst=0: sent.append(data) or [])
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert evaluators[1].evaluate() == {}
    monkeypatch.setattr(comm, "gather", lambda data, dst=0: [data, *sent])
    monkeypatch.setattr(comm, "is_main_process", lambda: True)
    found = evaluators[0].evaluate()["bytes_per_image"]
    assert found["8bit"] == 5 * (5 * 5 + 3 * 7 * 5) / 4
