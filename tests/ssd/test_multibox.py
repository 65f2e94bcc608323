"""Prior boxes, matching, hard negatives and the losses, against loops; nothing makes the host wait."""

import copy

import naive_ssd as naive
import numpy as np
import pytest
import torch
from distill_d2.projects.ssd.multibox import Targets, match_priors, multibox_losses
from distill_d2.projects.ssd.priors import SSDPriors
from ssd_case import WIDTHS, config, maps

from distill_d2.testing.synchronization import no_synchronization
from distill_d2.views.matching import hard_negatives

K = 3  # foreground classes
KEYS = ("STRIDES", "MIN_SIZES", "MAX_SIZES", "ASPECT_RATIOS")

# Prior boxes


def priors(network="C", **keys):
    node = config(network, **keys).MODEL.SSD
    return SSDPriors(node.SIZE, *(node[key] for key in KEYS))


@pytest.mark.parametrize("network, count", [("A", 8732), ("B", 3000), ("C", 3000)])
def test_priors_by_loops(network, count):
    generator, node = priors(network), config(network).MODEL.SSD
    expected = naive.priors(WIDTHS[network], *(node[key] for key in KEYS), node.SIZE)
    found = generator.relative(maps(WIDTHS[network]))
    assert found.shape == (count, 4) and found.dtype == torch.float32
    np.testing.assert_allclose(found, naive.corners(expected), rtol=0, atol=2e-7)
    pixels = torch.cat([boxes.tensor for boxes in generator(maps(WIDTHS[network]))])
    assert torch.equal(pixels, found * node.SIZE)
    assert not generator.state_dict() and not list(generator.parameters())


def test_priors_of_a_level_that_is_not_square():
    generator = SSDPriors(300, [100], [60], [135], [[4.0]])
    (boxes,) = generator([torch.empty(1, 1, 2, 3)])
    assert generator.num_priors == [4]
    expected = [
        *([20, 20, 80, 80], [5, 5, 95, 95]),  # sides 60 and sqrt(60 * 135) = 90
        *([-10, 35, 110, 65], [35, -10, 65, 110]),  # 120 x 30 and 30 x 120
    ]
    torch.testing.assert_close(boxes.tensor[:4], torch.tensor(expected, dtype=torch.float32))
    centers = [[x, y] for y in (50, 150) for x in (50, 150, 250)]
    assert boxes.get_centers()[::4].round().tolist() == centers


def test_priors_do_not_depend_on_the_sizes_asked_for_before():
    generator = priors()
    first = generator.relative(maps(WIDTHS["C"]))
    assert len(generator.relative(maps([2] * 6))) == 6 * 4 * 6
    for again in (generator, copy.deepcopy(generator)):
        assert torch.equal(again.relative(maps(WIDTHS["C"])), first)


@pytest.mark.parametrize("key", KEYS)
def test_one_entry_per_level(key):
    entries = list(config().MODEL.SSD[key])
    with pytest.raises(ValueError, match="MODEL.SSD: STRIDES, .* one entry per level; got .*5"):
        priors(**{key: entries[:5]})


# Matching


def matched(iou, valid, threshold):
    """For each image and prior box, the index of its object; None: background."""
    iou, valid = torch.tensor(iou), torch.tensor(valid)
    with no_synchronization():
        index, positive = match_priors(iou, valid, threshold)
    return [[k if p else None for k, p in zip(*rows)] for rows in zip(index.tolist(), positive.tolist())]


def test_matching_by_hand():
    iou = [[[0.1, 0.9, 0.5, 0.49], [0.2, 0.3, 0.1, 0.1], [0.1, 0.05, 0.02, 0.01]]]
    # Prior box 0 is the best one of object 2 only, prior box 1 of both others: the last one has it.
    assert matched(iou, [[True] * 3], 0.5) == [[2, 1, 0, None]]
    assert matched(iou, [[True, False, True]], 0.5) == [[2, 0, 0, None]]
    assert matched(iou, [[False] * 3], 0.5) == [[None] * 4]


@pytest.mark.parametrize("seed", range(8))
def test_matching_by_loops(seed):
    """Overlaps are tenths, so that some are equal to each other and to the threshold."""
    random = np.random.default_rng(seed)
    objects, rows = random.integers(1, 9), random.integers(1, 30)
    overlaps = random.integers(0, 11, (3, objects, rows)) / 10
    valid = random.integers(0, 2, (3, objects)).astype(bool)
    for image, found in enumerate(matched(overlaps, valid, 0.6)):
        there = valid[image].nonzero()[0].tolist()
        expected = naive.match(overlaps[image, there], 0.6) if there else [None] * rows
        assert found == [None if k is None else there[k] for k in expected]


# The losses


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ratio", [0.0, 1.0, 3.0, 7.0])
def test_hard_negatives_by_loops(seed, ratio):
    random = np.random.default_rng(seed)
    losses = random.exponential(1, (5, 40))
    positive = random.uniform(size=losses.shape) < random.uniform(0, 0.3, (5, 1))
    positive[0] = False
    mask = hard_negatives(torch.tensor(losses), torch.tensor(positive), ratio).numpy()
    for i in range(5):
        assert set(np.flatnonzero(mask[i])) == naive.hard_negatives(losses[i], positive[i], ratio)


def case(seed=0, images=3, rows=30, share=0.1):
    """Random logits, deltas, labels, and deltas of the objects."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, K, (images, rows))
    labels[random.uniform(size=labels.shape) > share] = K
    logits, deltas = random.normal(0, 2, (images, rows, K + 1)), random.normal(0, 2, (images, rows, 4))
    return logits, deltas, labels, random.normal(0, 2, (images, rows, 4))


def losses_of(logits, deltas, labels, target_deltas, ratio=3.0):
    classes = torch.as_tensor(labels)
    targets = Targets(classes, torch.zeros(*classes.shape, 4), classes != K)
    target_deltas = torch.as_tensor(target_deltas)
    with no_synchronization():
        return multibox_losses(logits, deltas, targets, target_deltas, ratio)


@pytest.mark.parametrize("ratio", [1.0, 3.0])
@pytest.mark.parametrize("seed, share", [(0, 0.1), (1, 0.1), (2, 0.03), (3, 0.0), (4, 1.0)])
def test_losses_by_loops(seed, share, ratio):
    """And their gradients, which are not 0 where a row counts."""
    logits, deltas, labels, target_deltas = case(seed, share=share)
    classes, boxes, selected = naive.multibox(logits, deltas, labels, target_deltas, K, ratio)
    assert (classes > 0) == (boxes > 0) == (share > 0)
    logits, deltas = (torch.tensor(x, requires_grad=True) for x in (logits, deltas))
    terms = losses_of(logits, deltas, labels, target_deltas, ratio)
    assert list(terms) == ["loss_cls", "loss_box_reg"]
    assert terms["loss_cls"].item() == pytest.approx(classes, rel=1e-12)
    assert terms["loss_box_reg"].item() == pytest.approx(boxes, rel=1e-12)
    sum(terms.values()).backward()
    assert logits.grad.isfinite().all() and deltas.grad.isfinite().all()
    for i, rows in enumerate(selected):
        assert set(logits.grad[i].any(dim=1).nonzero().flatten().tolist()) == rows
        assert torch.equal(deltas.grad[i].any(dim=1), torch.tensor(labels[i] != K))
