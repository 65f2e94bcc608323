"""Pooling without waiting, as detectron2's ROIPooler does it."""

import numpy as np
import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from gid_case import close, random_boxes

from distill_d2.losses.gid.pooling import pool


def maps_of(padded, strides=(8, 16, 32), images=2, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(
            images, channels, -(-padded[0] // s), -(-padded[1] // s), generator=generator
        ).requires_grad_()
        for s in strides
    ]


def of_all_levels(random, padded, count):
    """Boxes of sides from 1 pixel to all of the image."""
    height, width = padded
    sides = np.exp(random.uniform(0, np.log([width, height]), (count, 2)))
    corner = random.uniform(0, 1, (count, 2)) * ([width, height] - sides)
    return torch.tensor(np.hstack([corner, corner + sides])).float()


def at_the_border(padded):
    height, width = padded
    return torch.tensor(
        [
            [0.0, 0, width, height],
            [0, 0, 12, height],
            [width - 12, 0, width, 15],
            [0, height - 11, 30, height],
            [width - 0.5, height - 0.5, width, height],
            [0, 0, 0, 0],
            [5, 5, 5, 40],
        ]
    )


def compare(maps, strides, boxes, resolution, ratio):
    pooler = ROIPooler(resolution, [1 / s for s in strides], ratio, "ROIAlignV2")
    reference = pooler(maps, [Boxes(per_image) for per_image in boxes])
    found = pool(maps, strides, boxes, resolution, ratio)
    images, slots = boxes.shape[:2]
    assert found.shape == (images, slots, maps[0].shape[1], resolution, resolution)
    close(found.flatten(0, 1), reference, "values")
    weights = torch.randn(reference.shape)
    gradients = (
        torch.autograd.grad((x * weights).sum(), maps) for x in (found.flatten(0, 1), reference)
    )
    for actual, expected in zip(*gradients):
        close(actual, expected, "gradient")


@pytest.mark.parametrize("seed", range(8))
def test_pooling_is_detectron2s(seed):
    """Random sizes, numbers of boxes, images, levels, resolutions and sampling ratios."""
    random = np.random.default_rng(seed)
    padded = tuple((32 * random.integers(8, 20, 2)).tolist())
    images, count = random.integers(1, 4), random.integers(1, 20)
    boxes = torch.stack([of_all_levels(random, padded, count) for _ in range(images)])
    strides = (4, 8, 16, 32)[int(random.integers(0, 4)) :]
    maps = maps_of(padded, strides, images, channels=int(random.integers(1, 6)), seed=seed)
    compare(maps, strides, boxes, int(random.integers(1, 11)), int(random.integers(1, 4)))


@pytest.mark.parametrize("padded", [(256, 320), (500, 700), (33, 70)], ids=str)
def test_pooling_at_the_border_is_detectron2s(padded):
    """Also of maps that are a little larger than the image."""
    boxes = at_the_border(padded)
    boxes = torch.stack([boxes, boxes.flip(0)])
    compare(maps_of(padded, (8, 16, 32, 64, 128)), (8, 16, 32, 64, 128), boxes, 10, 2)


def test_memory_layout_does_not_matter():
    random, strides = np.random.default_rng(0), (8, 16, 32)
    boxes = torch.stack([random_boxes(random, 5, (256, 320)) for _ in range(2)])
    maps = maps_of((256, 320))
    last = [level.detach().to(memory_format=torch.channels_last).requires_grad_() for level in maps]
    found, other = (pool(levels, strides, boxes, 4, 2) for levels in (maps, last))
    torch.testing.assert_close(other, found)
    gradients = (torch.autograd.grad(x.square().sum(), m) for x, m in ((found, maps), (other, last)))
    for actual, expected in zip(*gradients):
        torch.testing.assert_close(actual, expected)


def test_levels_without_a_gradient_do_without():
    maps = maps_of((64, 64))
    boxes = torch.tensor([[[1.0, 2, 30, 40]]] * 2)
    pool(maps, (8, 16, 32), boxes, 2, 2).sum().backward()
    assert maps[0].grad.any() and not maps[1].grad.any() and not maps[2].grad.any()
    assert not pool([level.detach() for level in maps], (8, 16, 32), boxes, 2, 2).requires_grad
