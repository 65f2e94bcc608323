"""Pooling without waiting: as detectron2's ROIPooler, and as the naive version."""

import naive_gid as naive
import numpy as np
import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from gid_case import Case, close, random_boxes

from distill_d2.losses.gid.pooling import level_of, pool
from distill_d2.testing.synchronization import no_synchronization

STRIDES = (8, 16, 32)


def maps_of(padded, strides=STRIDES, images=2, channels=3, seed=0):
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


def compare(maps, strides, boxes, resolution, ratio, precision=1e-5):
    pooler = ROIPooler(resolution, [1 / s for s in strides], ratio, "ROIAlignV2")
    expected = pooler(maps, [Boxes(per_image) for per_image in boxes])
    found = pool(maps, strides, boxes, resolution, ratio)
    images, slots = boxes.shape[:2]
    channels = maps[0].shape[1]
    assert found.shape == (images, slots, channels, resolution, resolution)
    close(found.flatten(0, 1), expected, "values", precision)
    weights = torch.randn(expected.shape)
    gradients = (torch.autograd.grad((x * weights).sum(), maps) for x in (found.flatten(0, 1), expected))
    for ours, theirs in zip(*gradients):
        close(ours, theirs, "gradient", precision)


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


@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_naive_pooling(ratio):
    random = np.random.default_rng(ratio)
    padded = (256, 512)
    boxes = torch.stack([of_all_levels(random, padded, 4) for _ in range(2)])
    boxes[0, 0] = torch.tensor([0.0, 0, 512, 256])
    maps = maps_of(padded)
    expected = naive.pool(maps, STRIDES, [naive.numbers(b) for b in boxes], 3, ratio)
    close(pool(maps, STRIDES, boxes, 3, ratio).flatten(0, 1), expected)


def test_level_of_each_box():
    sides = torch.tensor([1.0, 111, 113, 223, 225, 447, 449, 5000])
    boxes = torch.stack([sides * 0, sides * 0, sides / 2, sides * 2], dim=1)
    assert level_of(boxes, (8, 16, 32)).tolist() == [0, 0, 0, 0, 1, 1, 2, 2]
    assert level_of(boxes, (4, 8, 16, 32)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert level_of(boxes, (16,)).tolist() == [0] * 8
    expected = [naive.level_of(box, (8, 16, 32)) - 3 for box in naive.numbers(boxes)]
    assert level_of(boxes, (8, 16, 32)).tolist() == expected


def test_image_and_level_of_each_box():
    """Maps of one number each: ten times the level, plus the image."""
    sizes = ((32, 64), (16, 32), (8, 16))
    image = torch.arange(3.0).view(3, 1, 1, 1)
    maps = [10.0 * level + image.expand(3, 1, *size) for level, size in enumerate(sizes)]
    boxes = torch.tensor([[[0.0, 0, 30, 30], [0, 0, 512, 250], [200, 10, 440, 250]]]).repeat(3, 1, 1)
    boxes[1] = boxes[1].flip(0)
    found = pool(maps, STRIDES, boxes, 2, 2)[:, :, 0, 1, 1]
    assert found.tolist() == [[0, 10, 10], [11, 11, 1], [2, 12, 12]]


def test_ramp_gives_coordinates():
    """Rows are rows and columns are columns, half a pixel to the left of a position's index."""
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(12.0), indexing="ij")
    found = pool([torch.stack([x, y])[None]], (8,), torch.tensor([[[16.0, 8, 48, 56]]]), 2, 2)
    assert found[0, 0, 0].tolist() == [[2.5, 4.5], [2.5, 4.5]]
    assert found[0, 0, 1].tolist() == [[2, 2], [5, 5]]


def test_memory_layout_does_not_matter():
    random = np.random.default_rng(0)
    boxes = torch.stack([random_boxes(random, 5, (256, 320)) for _ in range(2)])
    maps = maps_of((256, 320))
    last = [level.detach().to(memory_format=torch.channels_last).requires_grad_() for level in maps]
    found, other = (pool(levels, STRIDES, boxes, 4, 2) for levels in (maps, last))
    torch.testing.assert_close(other, found)
    gradients = (torch.autograd.grad(x.square().sum(), m) for x, m in ((found, maps), (other, last)))
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs)


def test_boxes_get_no_gradient_and_levels_without_do_without():
    maps = maps_of((64, 64))
    boxes = torch.tensor([[[1.0, 2, 30, 40]]] * 2)
    pool(maps, STRIDES, boxes, 2, 2).sum().backward()
    assert maps[0].grad.any() and not maps[1].grad.any() and not maps[2].grad.any()
    assert not pool([level.detach() for level in maps], STRIDES, boxes, 2, 2).requires_grad


def test_pooling_does_not_synchronise():
    boxes = torch.stack([at_the_border((256, 320))] * 2)
    maps = maps_of((256, 320))
    with no_synchronization():
        pool(maps, STRIDES, boxes, 4, 2)


# By the loss


def test_levels_may_be_named_in_any_order():
    found = {}
    for names in (("p3", "p4", "p5"), ("p5", "p3", "p4"), ()):
        case = Case(in_features=names)
        found[names] = case.loss.pooled(*case.views(), case.instances())
    for features in found.values():
        for ours, expected in zip(features, found[()]):
            assert torch.equal(ours, expected)


def test_only_the_named_levels_are_pooled():
    case = Case(in_features=("p4", "p5"))
    instances = case.instances()
    expected = naive.pool(
        [case.student.maps["p4"], case.student.maps["p5"]],
        (16, 32),
        [naive.numbers(boxes) for boxes in instances.boxes],
        2,
        2,
    )
    close(case.loss.pooled(*case.views(), instances)[0].flatten(0, 1), expected)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_levels_are_adapted_before_they_are_pooled(kernel, shared):
    case = Case(channels=(3, 5), adapter_kernel_size=kernel, adapter_share_weights=shared)
    names = ["shared"] if shared else ["p3", "p4", "p5"]
    assert list(case.loss.pairs.adapters) == names
    adapters = [case.loss.pairs.adapters[names[i % len(names)]] for i in range(3)]
    assert all(a.weight.shape == (5, 3, kernel, kernel) and a.stride == (1, 1) for a in adapters)
    maps = naive.adapt(
        list(case.student.maps.values()), [a.weight for a in adapters], [a.bias for a in adapters]
    )
    instances = case.instances()
    boxes = [naive.numbers(boxes) for boxes in instances.boxes]
    ours, theirs = case.loss.pooled(*case.views(), instances)
    close(ours.flatten(0, 1), naive.pool(maps, STRIDES, boxes, 2, 2))
    close(theirs.flatten(0, 1), naive.pool(list(case.teacher.maps.values()), STRIDES, boxes, 2, 2))
