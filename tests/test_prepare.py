"""A prepared teacher computes what the unprepared one does."""

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.layers import Conv2d, FrozenBatchNorm2d, NaiveSyncBatchNorm
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import Boxes
from torch import nn

from distill_d2.precision import native_bfloat16
from distill_d2.teacher import Teacher, prepare
from distill_d2.teacher.prepare import fold_norms
from distill_d2.testing.tiny import tiny_config, tiny_detector
from distill_d2.views.predictions import rows_of


def randomise(norm):
    """Statistics and weights that are far from the identity."""
    for name, value in [*norm.named_parameters(), *norm.named_buffers()]:
        if value.is_floating_point():
            nn.init.uniform_(value, 0.3, 3.0)
            if name in ("bias", "running_mean"):
                value.data.sub_(1.5)
    return norm


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


NORMS = {
    "FrozenBN": FrozenBatchNorm2d,
    "BN": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "naiveSyncBN": NaiveSyncBatchNorm,
    "without weights": lambda channels: nn.BatchNorm2d(channels, affine=False),
    "large eps": lambda channels: nn.BatchNorm2d(channels, eps=0.1),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("norm", NORMS.values(), ids=list(NORMS))
@torch.no_grad()
def test_folding_changes_nothing(norm, groups, bias):
    conv = Conv2d(4, 6, 3, padding=1, groups=groups, bias=bias, norm=randomise(norm(6)))
    conv = conv.eval()
    image = torch.randn(2, 4, 8, 8)
    expected = conv(image)
    assert fold_norms(conv) == 1
    assert conv.norm is None and conv.bias.shape == (6,)
    assert relative_error(conv(image), expected) < 1e-5


@torch.no_grad()
def test_activation_stays():
    conv = Conv2d(4, 6, 3, norm=randomise(nn.BatchNorm2d(6)), activation=nn.functional.relu).eval()
    image = torch.randn(2, 4, 8, 8)
    expected = conv(image)
    fold_norms(conv)
    assert (expected == 0).any()
    torch.testing.assert_close(conv(image), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "norm",
    [None, nn.GroupNorm(2, 6), nn.BatchNorm2d(6, track_running_stats=False)],
    ids=["none", "GN", "statistics of the batch"],
)
def test_other_norms_are_left_alone(norm):
    conv = Conv2d(4, 6, 3, norm=norm).eval()
    assert fold_norms(conv) == 0
    assert conv.norm is norm


def test_counts_the_folded_layers():
    model = nn.Sequential(
        Conv2d(3, 4, 1, norm=FrozenBatchNorm2d(4)),
        Conv2d(4, 4, 1),
        Conv2d(4, 4, 1, norm=nn.BatchNorm2d(4)),
    )
    assert fold_norms(model.eval()) == 2
    assert fold_norms(model) == 0


def test_folded_parameters_stay_frozen():
    conv = Conv2d(4, 6, 3, bias=False, norm=nn.BatchNorm2d(6)).eval().requires_grad_(False)
    fold_norms(conv)
    assert not any(p.requires_grad for p in conv.parameters())
    assert {name for name, _ in conv.named_parameters()} == {"weight", "bias"}


@torch.no_grad()
def test_folding_detectron2s_resnet_50_fpn():
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
    backbone = build_backbone(cfg).eval()
    for module in backbone.modules():
        if isinstance(module, FrozenBatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.2, 0.8)
    image = torch.randn(1, 3, 64, 64)
    expected = backbone(image)
    assert fold_norms(backbone) == 53
    actual = backbone(image)
    assert list(actual) == ["p3", "p4", "p5", "p6", "p7"]
    assert max(relative_error(actual[name], expected[name]) for name in expected) < 1e-5


def detector_outputs(teacher, images):
    teacher.view.require("dense")
    with teacher.view.recording():
        teacher.observe(images, (64, 64))
        dense = teacher.view.dense()
        return {**teacher.view.features, "logits": dense.logits, "deltas": dense.deltas}


def test_prepared_teacher_equals_the_unprepared():
    model = build_model(tiny_config())
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            randomise(module)
    images = [torch.rand(3, 64, 64) * 255, torch.rand(3, 48, 56) * 255]
    plain = detector_outputs(Teacher(model, prepare=False), images)
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    ready = detector_outputs(Teacher(model, prepare=True), images)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert list(ready) == ["p2", "p3", "p4", "logits", "deltas"]
    assert max(relative_error(ready[name], plain[name]) for name in plain) < 1e-5


OUTPUTS = {
    "retinanet": ["dense"],
    "fcos": ["dense"],
    "faster": ["rpn", "box_head"],
}
PROPOSALS = [
    Boxes(torch.tensor([[2.0, 3.0, 40.0, 50.0], [0.0, 0.0, 64.0, 64.0]])),
    Boxes(torch.tensor([[5.0, 5.0, 9.0, 12.0]])),
]


def head_outputs(teacher, capability, images):
    with teacher.view.recording():
        teacher.observe(images, (64, 64))
        arguments = (PROPOSALS,) if capability == "box_head" else ()
        predictions = getattr(teacher.view, capability)(*arguments)
        outputs = {"logits": predictions.logits, "deltas": predictions.deltas}
        centerness = predictions.centerness_levels
        return {**outputs, **({"centerness": rows_of(centerness)} if centerness else {})}


@pytest.mark.parametrize("family, capabilities", OUTPUTS.items(), ids=list(OUTPUTS))
def test_heads_of_a_prepared_teacher_equal_the_unprepared(family, capabilities):
    model = tiny_detector(family)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            randomise(module)
        elif isinstance(module, (nn.Conv2d, nn.Linear)) and not name.startswith("backbone"):
            nn.init.normal_(module.weight, std=0.1)  # a new head gives the same everywhere
    images = [torch.rand(3, 64, 64) * 255, torch.rand(3, 48, 56) * 255]
    outputs = []
    for prepare_it in (False, True):
        teacher = Teacher(model, prepare=prepare_it)
        for capability in capabilities:
            teacher.view.require(capability)
        outputs.append([head_outputs(teacher, capability, images) for capability in capabilities])
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    assert ("centerness" in outputs[0][0]) is (family == "fcos")
    for plain, ready in zip(*outputs):
        for name in plain:
            varied = plain[name].std() > 0.01 * plain[name].abs().mean()
            assert varied and relative_error(ready[name], plain[name]) < 1e-5


def test_channels_last_equals_contiguous(monkeypatch):
    model, seen = build_model(tiny_config()), []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = [torch.rand(3, 64, 64) * 255, torch.rand(3, 48, 56) * 255]
    outputs = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        teacher = Teacher(model)
        monkeypatch.setattr(teacher, "_memory_format", lambda memory_format=memory_format: memory_format)
        outputs.append(detector_outputs(teacher, images))
        assert seen[-1].is_contiguous(memory_format=memory_format)
    assert torch.equal(seen[0], seen[1])
    plain, last = outputs
    assert max(relative_error(last[name], plain[name]) for name in plain) < 1e-5


def test_channels_last_is_what_a_cpu_gets():
    teacher = Teacher(build_model(tiny_config()))
    teacher.observe([torch.zeros(3, 64, 64)], (64, 64))
    weight = teacher.model.backbone.bottom_up.stem.conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_native_bfloat16_is_a_bool():
    assert native_bfloat16(torch.device("cpu")) in (True, False)
    assert native_bfloat16(torch.device("meta")) is False


@pytest.mark.parametrize("support", [(False, False), (True, False), (False, True)])
def test_native_bfloat16_asks_for_instructions(monkeypatch, support):
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    for name, answer in zip(names, support):
        monkeypatch.setattr(prepare.torch.cpu, name, lambda answer=answer: answer, raising=False)
    assert native_bfloat16(torch.device("cpu")) is any(support)


def test_native_bfloat16_without_torchs_private_names(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(prepare.torch.cpu, name, raising=False)
    assert native_bfloat16(torch.device("cpu")) is False


@torch.no_grad()
def test_prefer_onednn_changes_no_output(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 8, 1),
        nn.Conv2d(8, 4, 1, stride=2, padding=1),
        nn.Conv2d(4, 2, (1, 3)),
    )
    image = torch.randn(2, 3, 9, 9)
    expected = model(image)
    assert prepare.prefer_onednn(model) == 2
    torch.testing.assert_close(model(image), expected)


def test_prefer_onednn_only_where_it_is_faster(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert prepare.prefer_onednn(nn.Conv2d(8, 8, 1)) == 0
