"""Weights in channels_last and oneDNN's kernels change no result, and leave no trace."""

import pytest
import torch
from torch import nn

from distill_d2.kernels import FastKernels, follow_layout, plain_layout

PLAIN, LAST = torch.contiguous_format, torch.channels_last
OPTIONS = [
    {},
    {"kernel_size": 3, "padding": 1},
    {"stride": 2},
    {"stride": 2, "padding": 1},
    {"groups": 4, "bias": False},
    {"groups": 16, "padding": "same"},
    {"padding": 1, "padding_mode": "reflect"},
]


def outputs_and_gradients(conv, image):
    conv.zero_grad()
    output = conv(image)
    (output * torch.arange(output.numel()).view_as(output).cos()).sum().backward()
    return [output.detach(), *(parameter.grad for parameter in conv.parameters())]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_convolutions_compute_the_same(monkeypatch, options):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    conv, image = nn.Conv2d(16, 32, **{"kernel_size": 1, **options}), torch.randn(3, 16, 9, 11)
    before = {name: getattr(conv, name) for name in ("dilation", "weight")}
    expected = outputs_and_gradients(conv, image)
    strides = conv.weight.stride()
    kernels = FastKernels(conv)
    assert conv.dilation == ((1, 1) if "kernel_size" in options else (2, 2))
    assert conv.weight is before["weight"] and conv.weight.is_contiguous(memory_format=LAST)
    for actual, known in zip(outputs_and_gradients(conv, image), expected):
        torch.testing.assert_close(actual, known, rtol=1e-4, atol=1e-4)
    kernels.undo()
    assert conv.dilation == before["dilation"] and conv.weight.stride() == strides


def test_saved_tensors_are_plain_and_share_what_they_shared():
    weight = torch.rand(4, 3, 2, 2).to(memory_format=LAST)
    module = nn.Conv2d(3, 4, 2).state_dict()
    module["weight"], vector = weight, torch.rand(3)
    data = {"model": module, "list": [weight.view_as(weight), vector], "turned": weight.mT}
    plain = plain_layout(data)
    assert plain["model"]["weight"].is_contiguous() and torch.equal(plain["model"]["weight"], weight)
    assert plain["model"]["weight"] is plain["list"][0] and plain["list"][1] is vector
    assert plain["model"]._metadata == module._metadata and plain["turned"] is data["turned"]
    assert data["model"]["weight"] is weight


def test_momentum_has_the_layout_of_its_parameter():
    parameter = nn.Parameter(torch.rand(4, 3, 2, 2).to(memory_format=LAST))
    optimizer = torch.optim.Adam([parameter])
    parameter.square().sum().backward()
    optimizer.step()
    state, known = optimizer.state[parameter], optimizer.state[parameter]["exp_avg"].clone()
    optimizer.load_state_dict(plain_layout(optimizer.state_dict()))
    state = optimizer.state[parameter]
    assert state["exp_avg"].is_contiguous()
    follow_layout(optimizer)
    assert state["exp_avg"].stride() == parameter.stride() and torch.equal(state["exp_avg"], known)
