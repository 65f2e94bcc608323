"""A prepared copy computes what the loaded model does, and leaves it as it is."""

import copy

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, NaiveSyncBatchNorm
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from torch import nn
from torch.nn import functional as F

from distill_d2.kernels import prefer_onednn
from distill_d2.precision import native_bfloat16
from distill_d2.teacher import Teacher, prepare
from distill_d2.teacher.prepare import fold_norms
from distill_d2.testing.tiny import tiny_config, tiny_detector
from distill_d2.views.predictions import rows_of


def randomize(norm):
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
    options = {"padding": 1, "groups": groups, "bias": bias, "activation": F.relu}
    conv = Conv2d(4, 6, 3, norm=randomize(norm(6)), **options).eval()
    image = torch.randn(2, 4, 8, 8)
    expected = conv(image)
    assert fold_norms(conv) == 1 and fold_norms(conv) == 0
    assert (expected == 0).any()
    assert conv.norm is None and conv.bias.shape == (6,)
    assert not any(p.requires_grad for p in conv.parameters())
    assert relative_error(conv(image), expected) < 1e-5


@pytest.mark.parametrize(
    "norm",
    [None, nn.GroupNorm(2, 6), nn.BatchNorm2d(6, track_running_stats=False)],
    ids=["none", "GN", "statistics of the batch"],
)
def test_other_norms_are_left_alone(norm):
    conv = Conv2d(4, 6, 3, norm=norm).eval()
    assert fold_norms(conv) == 0 and conv.norm is norm


OUTPUTS = {"retinanet": ["dense"], "fcos": ["dense"], "faster": ["rpn", "box_head"]}
PROPOSALS = [
    Boxes(torch.tensor([[2.0, 3.0, 40.0, 50.0], [0.0, 0.0, 64.0, 64.0]])),
    Boxes(torch.tensor([[5.0, 5.0, 9.0, 12.0]])),
]


def head_outputs(teacher, capability, images):
    with teacher.view.recording():
        teacher.observe(images, (64, 96))
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
            randomize(module)
        elif isinstance(module, (nn.Conv2d, nn.Linear)) and not name.startswith("backbone"):
            nn.init.normal_(module.weight, std=0.1)  # a new head gives the same everywhere
    images = [torch.rand(3, 64, 80) * 255, torch.rand(3, 48, 96) * 255]
    outputs = []
    for prepare_it in (False, True):
        teacher = Teacher(model, prepare=prepare_it)
        for capability in capabilities:
            teacher.view.require(capability)
        outputs.append([head_outputs(teacher, capability, images) for capability in capabilities])
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in teacher.view.model.modules())
    assert ("centerness" in outputs[0][0]) is (family == "fcos")
    for plain, ready in zip(*outputs):
        for name in plain:
            varied = plain[name].std() > 0.01 * plain[name].abs().mean()
            assert varied and relative_error(ready[name], plain[name]) < 1e-5


def test_channels_last_is_what_a_cpu_gets():
    teacher, seen = Teacher(build_model(tiny_config())), []
    teacher.model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    teacher.observe([torch.zeros(3, 64, 96)], (64, 96))
    weight = teacher.view.model.backbone.bottom_up.stem.conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_a_norm_that_is_read_is_not_folded():
    model, path, outputs = tiny_detector(), "backbone.bottom_up.stem.conv1.norm", []
    randomize(model.get_submodule(path))
    for prepare_it in (False, True):
        teacher = Teacher(model, prepare=prepare_it)
        teacher.view.require_tap(path)
        with teacher.view.recording():
            teacher.observe([torch.full((3, 64, 96), 50.0)], (64, 96))
            outputs.append(teacher.view.tap("backbone.bottom_up.stem.conv1.norm"))
    assert relative_error(*outputs) < 1e-5


# The loaded model stays as it is.


def tensors_of(module):
    return [*module.parameters(), *module.buffers()]


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("family", ["retinanet", "faster", "fcos"])
def test_prepared_copy_shares_what_it_does_not_change(family, heads):
    model = tiny_detector(family).eval().requires_grad_(False)
    before = {name: (tensor.clone(), tensor.stride()) for name, tensor in model.state_dict().items()}
    dilations = [m.dilation for m in model.modules() if isinstance(m, nn.Conv2d)]
    copied = prepare.prepared_copy(model, torch.channels_last, heads=heads)

    after = model.state_dict()
    assert list(after) == list(before)
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name][0]) and tensor.stride() == before[name][1]
    assert dilations == [m.dilation for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert not set(copied.modules()) & set(model.modules())

    prepared = copied if heads else copied.backbone
    own = {id(tensor) for tensor in tensors_of(model)}
    new = {id(tensor) for tensor in tensors_of(copied) if id(tensor) not in own}
    assert new <= {id(tensor) for tensor in tensors_of(prepared)}
    memory = {tensor.data_ptr() for tensor in tensors_of(model)}
    for name, module in prepared.named_modules():
        if isinstance(module, nn.Conv2d):
            folded = isinstance(module, Conv2d) and module.norm is None and module.bias is not None
            shared = module.weight.data_ptr() in memory
            original = model.get_submodule(name if heads else f"backbone.{name}")
            if folded and getattr(original, "norm", None) is not None:
                assert not shared
            else:
                assert shared is (module.kernel_size == (1, 1))  # which has every layout
        elif list(module.parameters(recurse=False)):
            assert all(id(tensor) in own for tensor in module.parameters(recurse=False))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layout_alone_equals_modules_to(layout):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 1, 3), nn.Linear(2, 3))
    expected = copy.deepcopy(model).to(memory_format=layout)
    prepare._use_memory_format(model, layout)
    for name, tensor in expected.state_dict().items():
        actual = model.state_dict()[name]
        assert torch.equal(actual, tensor) and actual.stride() == tensor.stride()


# Reduced precision.


@pytest.mark.parametrize("support", [(False, False), (True, False), (False, True), None])
def test_native_bfloat16_asks_for_instructions(monkeypatch, support):
    """By private names of torch, which may be missing."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    for name, answer in zip(names, support or (None, None)):
        monkeypatch.setattr(torch.cpu, name, lambda answer=answer: answer, raising=False)
        if support is None:
            monkeypatch.delattr(torch.cpu, name)
    assert native_bfloat16(torch.device("cpu")) is any(support or ())
    assert native_bfloat16(torch.device("meta")) is False


@torch.no_grad()
def test_prefer_onednn_changes_no_output(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    pointwise = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1, stride=2, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *pointwise, nn.Conv2d(4, 2, (1, 3)))
    image = torch.randn(2, 3, 9, 9)
    expected = model(image)
    assert prefer_onednn(model) == 2
    torch.testing.assert_close(model(image), expected)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert prefer_onednn(model) == 0  # it is no faster there
