"""distill_d2.upload: copies between devices and memory layouts."""

import pytest
import torch

from distill_d2.upload import contiguous, upload

LAST = torch.channels_last


@pytest.mark.parametrize(
    "shape", [(2, 3, 4, 5), (1, 64, 7, 9), (3, 1, 4, 4), (2, 8, 1, 1), (0, 3, 4, 4)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contiguous_copy_of_maps_with_channels_last(shape, dtype):
    maps = torch.randn(shape).to(dtype).contiguous(memory_format=LAST)
    copy = contiguous(maps)
    assert copy.is_contiguous() and copy.dtype is dtype and torch.equal(copy, maps)


def test_large_maps():
    """Large enough for torch's copy by blocks."""
    maps = torch.randn(2, 96, 60, 70).contiguous(memory_format=LAST)
    assert torch.equal(contiguous(maps), maps)


def test_what_is_contiguous_stays_itself():
    maps = torch.randn(2, 3, 4, 5)
    assert contiguous(maps) is maps
    assert torch.equal(contiguous(maps.transpose(2, 3)), maps.transpose(2, 3))
    assert torch.equal(contiguous(maps[0, 0].t()), maps[0, 0].t())


def test_gradients_pass():
    maps = torch.randn(2, 3, 4, 5).contiguous(memory_format=LAST).requires_grad_()
    weights = torch.randn(2, 3, 4, 5)
    (contiguous(maps) * weights).sum().backward()
    assert torch.equal(maps.grad, weights)


def test_upload_on_the_cpu_is_the_tensor_itself():
    tensor = torch.arange(3)
    assert upload(tensor, torch.device("cpu")) is tensor
