"""The head: names, what it computes, the max filter against loops."""

import naive_poto as naive
import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from distill_d2.projects.poto import MaxFiltering, POTOHead
from poto_case import VARIANTS, poto
from torch import nn

SIZES = [(6, 9), (3, 5), (2, 2), (1, 1)]


def features(channels=32, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, channels, *size, generator=generator) for size in SIZES[:count]]


def head(count=3, **keys):
    shapes = [ShapeSpec(channels=32)] * count
    return POTOHead(input_shape=shapes, num_classes=5, conv_dims=[32, 32], **keys)


# Names


def names_of(variant, **keys):
    state = poto(variant, NUM_CONVS=2, **keys).state_dict()
    return {name[len("head.") :] for name in state if name.startswith("head.")}


@pytest.mark.parametrize("variant", VARIANTS)
def test_names(variant):
    layers = {f"{tower}_subnet.{i}" for tower in ("cls", "bbox") for i in (0, 1, 3, 4)}
    layers |= {"cls_score", "bbox_pred"}
    if variant in ("3dmf", "both"):
        layers |= {"max3d.conv", "max3d.norm", "filter"}
    expected = {f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")}
    assert names_of(variant) == expected | {f"scales.{level}.scale" for level in range(3)}


def test_names_without_norms():
    assert not any(name.startswith("max3d.norm") for name in names_of("3dmf", FILTER_NORM=""))
    towers = {"cls_subnet.0.weight", "cls_subnet.2.weight", "bbox_subnet.2.bias"}
    assert towers < names_of("plain", NORM="")


# What it computes


def test_outputs():
    """By its own layers; every level has its scale."""
    model, levels = head(max_filtering=MaxFiltering(32)), features()
    for index, scale in enumerate(model.scales):
        assert scale.scale.tolist() == [1.0]
        nn.init.constant_(scale.scale, 1.5 + index)
    logits, deltas, filters = model(levels)
    towers = [model.bbox_subnet(level) for level in levels]
    for index, level in enumerate(levels):
        size = level.shape[-2:]
        assert logits[index].shape == (2, 5, *size) and filters[index].shape == (2, 1, *size)
        torch.testing.assert_close(logits[index], model.cls_score(model.cls_subnet(level)))
        torch.testing.assert_close(deltas[index], model.bbox_pred(towers[index]) * (1.5 + index))
        torch.testing.assert_close(filters[index], model.filter(model.max3d(towers)[index]))
    assert len(head()(levels)) == 2


def test_start():
    """Probabilities are the prior; with the filter half of it."""
    logits, deltas, filters = head(max_filtering=MaxFiltering(32), prior_prob=0.02)(features())
    for index in range(3):
        assert logits[index].sigmoid().mean().item() == pytest.approx(0.02, rel=0.3)
        assert filters[index].sigmoid().mean().item() == pytest.approx(0.5, abs=0.1)
        assert deltas[index].abs().max() < 2


# The max filter


@pytest.mark.parametrize("tau", [0, 2, 4])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_filter_by_loops(kernel, tau):
    """With one channel and a convolution that changes nothing."""
    levels = features(1, count=4, seed=kernel + tau)
    model = MaxFiltering(1, norm="", kernel_size=kernel, tau=tau)
    nn.init.dirac_(model.conv.weight)
    outputs = model(levels)
    for image in range(2):
        maps = [level[image, 0].double().numpy() for level in levels]
        for found, expected in zip(outputs, naive.max_filter(maps, maps, kernel, tau)):
            np.testing.assert_allclose(found[image, 0].detach(), expected, atol=1e-5)


def test_filter_convolves_first_and_normalizes_last():
    model, levels = MaxFiltering(32), features()
    model.conv.weight.data.normal_(std=0.1)
    model.norm.weight.data.uniform_(0.5, 2.0)
    plain = MaxFiltering(32, norm="")
    plain.conv = nn.Identity()
    hidden = [model.conv(level) for level in levels]
    # The largest values alone; raised by 100, so that none is below 0.
    highest = [x - h - 200 for x, h in zip(plain([h + 100 for h in hidden]), hidden)]
    for found, high, level in zip(model(levels), highest, levels):
        expected = torch.nn.functional.group_norm(high + level, 32, model.norm.weight, model.norm.bias)
        torch.testing.assert_close(found, expected.relu(), rtol=1e-3, atol=1e-3)
