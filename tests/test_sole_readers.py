"""Norms that are modules of their own are folded where it is certain that nobody else reads the convolution."""

import copy
import sys

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn
from torch.nn.utils import parametrizations

from distill_d2.teacher.prepare import fold_separate_norms, prepared_copy


class Detector(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)


def randomize(model):
    """Statistics and weights of norms that are far from the identity."""
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            for tensor in (module.weight, module.running_var):
                nn.init.uniform_(tensor, 0.5, 2.0)
            for tensor in (module.bias, module.running_mean):
                nn.init.uniform_(tensor, -0.5, 0.5)
    return model


# Which norms.


class Block(nn.Module):
    """A convolution and a norm, and what else ``read`` does with the convolution's output."""

    def __init__(self, read, norm=nn.BatchNorm2d, conv=nn.Conv2d):
        super().__init__()
        self.conv, self.norm, self.read = conv(3, 4, 1), norm(4), read

    def forward(self, image):
        return self.read(self, self.conv(image), image)


class Standardized(nn.Conv2d):
    def forward(self, image):
        return self._conv_forward(image, self.weight / self.weight.std(), self.bias)


class Scaled(nn.BatchNorm2d):
    def forward(self, maps):
        return 2 * super().forward(maps)


def add_first(block, maps, image):
    maps += 1
    return block.norm(maps)


FOLDED = {
    "plain": Block(lambda b, maps, _: b.norm(maps).relu_()),
    "detectron2's": Block(lambda b, maps, _: b.norm(maps), FrozenBatchNorm2d),
    "shapes are no values": Block(lambda b, maps, _: b.norm(maps)[..., : maps.shape[-1] // maps.dim()]),
    "sequence": nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()),
}
LEFT = {
    "added": Block(lambda b, maps, _: b.norm(maps) + maps),
    "read before": Block(lambda b, maps, _: maps.mean() + b.norm(maps)),
    "changed before": Block(add_first),
    "a view": Block(lambda b, maps, _: b.norm(maps[:, :, 1:])),
    "returned": Block(lambda b, maps, _: {"norm": b.norm(maps), "conv": maps}),
    "norm called twice": Block(lambda b, maps, _: b.norm(b.norm(maps))),
    "convolution called twice": Block(lambda b, maps, image: b.norm(maps) + b.conv(image + 1)),
    "norm of the input": Block(lambda b, maps, image: b.norm(image.repeat(1, 2, 1, 1)[:, :4]) + maps),
    "statistics of the batch": Block(
        lambda b, maps, _: b.norm(maps), lambda n: nn.BatchNorm2d(n, track_running_stats=False)
    ),
    "another norm": Block(lambda b, maps, _: b.norm(maps), Scaled),
    "another convolution": Block(lambda b, maps, _: b.norm(maps), conv=Standardized),
    "parametrized": Block(
        lambda b, maps, _: b.norm(maps), conv=lambda *a: parametrizations.weight_norm(nn.Conv2d(*a))
    ),
}


@pytest.mark.parametrize("name", [*FOLDED, *LEFT])
@torch.no_grad()
def test_only_certain_pairs_are_folded(name):
    block = randomize(copy.deepcopy({**FOLDED, **LEFT}[name]))
    model, image = Detector(block), torch.randn(2, 3, 6, 8)
    ready = copy.deepcopy(model)
    assert fold_separate_norms(ready, (8, 8)) == (name in FOLDED)
    assert any(isinstance(m, nn.Identity) for m in ready.modules()) == (name in FOLDED)
    actual, expected = ready.backbone(image), model.backbone(image)
    if isinstance(expected, dict):
        actual, expected = actual["norm"], expected["norm"]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", ["conv", "norm", ""])
def test_outputs_that_are_read_stay(kept):
    """Those of a tapped module; "" is the whole, which returns what the norm returns."""
    model = Detector(copy.deepcopy(FOLDED["plain"]))
    modules = [model.backbone.get_submodule(kept)]
    assert fold_separate_norms(model, (8, 8), modules) == (kept == "")
    hook = model.backbone.conv.register_forward_hook(lambda *_: None)
    assert fold_separate_norms(model, (8, 8)) == 0
    hook.remove()


def test_a_container_whose_output_is_the_convolutions():
    model = Detector(nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4)))
    assert fold_separate_norms(copy.deepcopy(model), (8, 8)) == 1
    assert fold_separate_norms(model, (8, 8), [model.backbone[0]]) == 0


# timm's models.

# Squeeze and excitation, activations inside norms, "same" padding, shortcuts; ConvNeXt has no batch norm.
NAMES = ["test_efficientnet", "test_resnet", "tf_efficientnet_lite0", "test_convnext"]
NAMES += ["mobilenetv3_small_050", "mobilenetv4_conv_small_035"]


@pytest.mark.parametrize("frozen", [False, True], ids=["BN", "FrozenBN"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_prepared_models_of_timm_compute_the_same(name, frozen):
    timm = pytest.importorskip("timm")
    body = randomize(timm.create_model(name, num_classes=0, global_pool=""))
    if frozen:
        body = timm.layers.freeze_batch_norm_2d(body)
    # Many layers without trained statistics enlarge rounding; in float64 none of it is seen.
    model, image = Detector(body).double(), torch.randn(2, 3, 64, 96).double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model.backbone(image)
    ready = prepared_copy(model, torch.channels_last, heads=False)
    actual = ready.backbone(image)
    assert (actual - expected).abs().max() < 1e-9 * expected.abs().max()
    assert not any(getattr(m, "running_var", None) is not None for m in ready.modules())
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[key], before[key]) for key in before)
    kept = {id(tensor) for tensor in model.buffers()} & {id(tensor) for tensor in ready.buffers()}
    assert {id(tensor) for tensor in ready.buffers()} == kept


def test_timm_is_not_imported_for_other_models(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    fold_separate_norms(Detector(copy.deepcopy(FOLDED["plain"])), (8, 8))
    assert "timm" not in sys.modules
