"""The two heads: what they compute, the position, their start."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from distill_d2.projects.solov2 import SOLOv2InstanceHead, SOLOv2MaskHead
from distill_d2.projects.solov2.head import coordinates_of
from solov2_case import GRIDS, batch, config, solov2

STRIDES = [4, 8, 16, 32, 64]


def levels_of(height, width, channels=16):
    return [torch.randn(2, channels, -(-height // s), -(-width // s)) for s in STRIDES]


def randomize(head):
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return head


def position(height, width):
    """(2, H, W) by loops."""
    x = [[-1 + 2 * j / (width - 1) for j in range(width)] for _ in range(height)]
    y = [[-1 + 2 * i / (height - 1) for _ in range(width)] for i in range(height)]
    return torch.tensor([x, y])


def test_position():
    found = coordinates_of(torch.zeros(3, 5, 4, 6))
    torch.testing.assert_close(found, position(4, 6)[None])
    assert coordinates_of(torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert coordinates_of(torch.zeros(1, 1, 1, 1)).tolist() == [[[[-1.0]], [[-1.0]]]]


def by_hand(head, feature, size, grid, coordinates):
    """A level's outputs: resized, with the position, to the grid; then two blocks and a convolution."""
    feature = F.interpolate(feature, size=size, mode="bilinear", align_corners=False)
    channels = feature.shape[1]
    whole = torch.cat([feature, position(*size).expand(2, -1, -1, -1)], dim=1)
    cells = F.interpolate(whole, size=(grid, grid), mode="bilinear", align_corners=False)
    outputs = []
    for tower, last, seen in (
        (head.cate_tower, head.cate_pred, channels),
        (head.kernel_tower, head.kernel_pred, channels + 2 * coordinates),
    ):
        x = cells[:, :seen]
        for index in (0, 3):
            x = F.conv2d(x, tower[index].weight, padding=1)
            x = F.group_norm(x, 32, tower[index + 1].weight, tower[index + 1].bias).relu()
        outputs.append(F.conv2d(x, last.weight, last.bias, padding=1))
    return outputs


@pytest.mark.parametrize("coordinates", [True, False])
@pytest.mark.parametrize("height, width", [(64, 96), (96, 160)])
def test_instance_head_by_hand(height, width, coordinates):
    """Of an image whose coarsest level, pooled, is half a cell larger than it."""
    widths = {"in_channels": 16, "channels": 32, "num_convs": 2, "num_classes": 3, "num_kernels": 32}
    strides = {"in_strides": STRIDES, "strides": [8, 8, 16, 32, 32]}
    head = SOLOv2InstanceHead(**widths, **strides, num_grids=GRIDS, coordinates=coordinates)
    randomize(head)
    levels = levels_of(height, width)
    logits, kernels = head(levels)
    for level, (feature, stride) in enumerate(zip(levels, [8, 8, 16, 32, 32])):
        size = (height // stride, width // stride)
        expected = by_hand(head, feature, size, GRIDS[level], coordinates)
        torch.testing.assert_close(logits[level], expected[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(kernels[level], expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("coordinates", [True, False])
def test_mask_head_by_hand(coordinates):
    widths = {"in_channels": 16, "channels": 32, "num_masks": 64}
    head = randomize(SOLOv2MaskHead(**widths, num_levels=4, coordinates=coordinates))
    levels, total = levels_of(64, 96)[:4], 0.0
    for index, x in enumerate(levels):
        if index == 3 and coordinates:
            x = torch.cat([x, position(2, 3).expand(2, -1, -1, -1)], dim=1)
        for number in range(max(index, 1)):
            convolution, norm, _ = head.convs_all_levels[index].get_submodule(f"conv{number}")
            x = F.conv2d(x, convolution.weight, padding=1)
            x = F.group_norm(x, 32, norm.weight, norm.bias).relu()
            if index:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        total = total + x
    convolution, norm, _ = head.conv_pred
    expected = F.group_norm(F.conv2d(total, convolution.weight), 32, norm.weight, norm.bias).relu()
    assert expected.shape == (2, 64, 16, 24)
    torch.testing.assert_close(head(levels), expected, rtol=1e-4, atol=1e-4)


def test_without_norms_convolutions_have_biases():
    """All but the last one of the mask branch, which keeps its norm."""
    widths = {"INSTANCE_CHANNELS": 20, "MASK_CHANNELS": 24}
    model = build_model(config(NORM="none", NUM_INSTANCE_CONVS=2, **widths))
    names = {n for n in model.state_dict() if n.startswith(("ins_head", "mask_head"))}
    towers = {
        f"ins_head.{tower}_tower.{index}.{kind}"
        for tower in ("cate", "kernel")
        for index in (0, 2)
        for kind in ("weight", "bias")
    }
    assert {n for n in names if "tower" in n} == towers
    last = {f"mask_head.conv_pred.{n}" for n in ("0.weight", "1.weight", "1.bias")}
    assert {n for n in names if "conv_pred" in n} == last
    assert "mask_head.convs_all_levels.2.conv1.0.bias" in names
    assert sum(model.train()(batch(2, 1)).values()).isfinite()


def test_start():
    """Scores of about the prior, all convolutions N(0, 0.01), no biases."""
    model = solov2(lively=False, PRIOR_PROB=0.05, INSTANCE_CHANNELS=128)
    scores = torch.cat([x.sigmoid().flatten() for x in model.ins_head(levels_of(64, 64, 32))[0]])
    assert scores.mean().item() == pytest.approx(0.05, rel=0.1)
    for head in (model.ins_head, model.mask_head):
        for name, layer in head.named_modules():
            if isinstance(layer, torch.nn.Conv2d):
                assert layer.weight.std().item() == pytest.approx(0.01, rel=0.15), name
                assert layer.bias is None or name == "cate_pred" or not layer.bias.any()
