"""Prior boxes."""

import copy

import naive_ssd as naive
import numpy as np
import pytest
import torch
from distill_d2.projects.ssd.priors import SSDPriors
from ssd_case import NETWORKS, WIDTHS, config, golden, maps

KEYS = ("STRIDES", "MIN_SIZES", "MAX_SIZES", "ASPECT_RATIOS")


def priors(network="C", **keys):
    node = config(network, **keys).MODEL.SSD
    return SSDPriors(node.SIZE, *(node[key] for key in KEYS))


@pytest.mark.parametrize("network, count", [("A", 8732), ("B", 3000), ("C", 3000)])
def test_by_loops(network, count):
    generator, node = priors(network), config(network).MODEL.SSD
    expected = naive.priors(WIDTHS[network], *(node[key] for key in KEYS), node.SIZE)
    found = generator.relative(maps(WIDTHS[network]))
    assert found.shape == (count, 4) and found.dtype == torch.float32
    np.testing.assert_allclose(found, naive.corners(expected), rtol=0, atol=2e-7)


@pytest.mark.parametrize("network, key", [("A", "priors_ssd300_8732"), ("B", "priors_kd_3000")])
def test_recorded(shared, network, key):
    found = priors(network).relative(maps(WIDTHS[network]))
    np.testing.assert_allclose(found, naive.corners(golden(shared)[key]), rtol=0, atol=2e-7)


def test_literals():
    """The first cell of a level of stride 100, of images of 300."""
    generator = SSDPriors(300, [100], [60], [135], [[4.0]])
    (boxes,) = generator(maps([3]))
    assert generator.num_priors == [4] and len(boxes) == 36
    expected = [
        *([20, 20, 80, 80], [5, 5, 95, 95]),  # sides 60 and sqrt(60 * 135) = 90
        *([-10, 35, 110, 65], [35, -10, 65, 110]),  # 120 x 30 and 30 x 120
    ]
    torch.testing.assert_close(boxes.tensor[:4], torch.tensor(expected, dtype=torch.float32))
    # x runs before y.
    centers = boxes.get_centers()[::4]
    assert centers[:4].round().tolist() == [[50, 50], [150, 50], [250, 50], [50, 150]]


def test_sides_and_centers_are_those_of_the_image_at_most():
    generator = SSDPriors(100, [80], [90], [400], [[4.0]])
    (boxes,) = generator(maps([2]))
    sides = boxes.tensor[:, 2:] - boxes.tensor[:, :2]
    assert sides.max() == 100 and boxes.get_centers().max() == 100
    torch.testing.assert_close(boxes.tensor[3], torch.tensor([17.5, -10.0, 62.5, 90.0]))


def test_pixels_are_the_size_times_the_relative_ones():
    generator, widths = priors(SIZE=512), maps(WIDTHS["C"])
    pixels = torch.cat([boxes.tensor for boxes in generator(widths)])
    assert torch.equal(pixels, generator.relative(widths) * 512)


def test_levels_that_are_not_square():
    (boxes,) = SSDPriors(300, [100], [60], [135], [[]])([torch.empty(1, 1, 2, 3)])
    assert boxes.get_centers()[::2].round().tolist() == [
        *([50, 50], [150, 50], [250, 50]),
        *([50, 150], [150, 150], [250, 150]),
    ]


def test_maps_of_other_sizes_have_their_own():
    """Whatever was asked for before."""
    generator = priors()
    first = generator.relative(maps(WIDTHS["C"]))
    assert len(generator.relative(maps([2] * 6))) == 6 * 4 * 6
    for again in (generator, copy.deepcopy(generator)):
        assert torch.equal(again.relative(maps(WIDTHS["C"])), first)


def test_nothing_to_save():
    generator = priors()
    generator(maps(WIDTHS["C"]))
    assert not generator.state_dict() and not list(generator.parameters())


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("network", NETWORKS)
def test_one_entry_per_level(network, key):
    entries = list(config(network).MODEL.SSD[key])
    with pytest.raises(ValueError, match="MODEL.SSD: STRIDES, .* one entry per level; got .*5"):
        priors(network, **{key: entries[:5]})
