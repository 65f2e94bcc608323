"""Matching, hard negatives and the losses, against loops."""

import naive_ssd as naive
import numpy as np
import pytest
import torch
from distill_d2.projects.ssd.multibox import Targets, match_priors, multibox_losses

from distill_d2.testing.synchronization import no_synchronization
from distill_d2.views.matching import hard_negatives

K = 3  # foreground classes


# Matching


def matched(iou, valid=None, threshold=0.5):
    """Of one image, the object of each prior box; None: background."""
    iou = torch.tensor(iou)
    valid = torch.ones(len(iou), dtype=torch.bool) if valid is None else torch.tensor(valid)
    index, positive = match_priors(iou[None], valid[None], threshold)
    return [i if p else None for i, p in zip(index[0].tolist(), positive[0].tolist())]


def test_literals():
    assert matched([[0.6, 0.1, 0.5, 0.49], [0.2, 0.1, 0.55, 0.3]]) == [0, None, 1, None]


def test_an_object_has_its_best_prior_box_however_little_they_overlap():
    assert matched([[0.0, 0.05, 0.02]]) == [None, 0, None]
    assert matched([[0.0, 0.05, 0.02], [0.0, 0.9, 0.01]]) == [None, 1, None]
    assert matched([[0.9, 0.8], [0.3, 0.2]]) == [1, 0]  # though the other object overlaps more


def test_the_last_object_has_a_prior_box_that_several_want():
    assert matched([[0.1, 0.9], [0.2, 0.3], [0.6, 0.5]]) == [2, 1]
    assert matched([[0.1, 0.9], [0.2, 0.3], [0.2, 0.1]]) == [2, 1]


def test_threshold_counts_as_an_object():
    assert matched([[0.9, 0.5, 0.49999]]) == [0, 0, None]
    assert matched([[0.9, 0.5, 0.3]], threshold=0.3) == [0, 0, 0]


def test_objects_that_only_fill_up():
    assert matched([[0.6, 0.1], [0.9, 0.9]], [True, False]) == [0, None]
    assert matched([[0.9, 0.9]], [False]) == [None, None]
    # Not even where they are between others.
    assert matched([[0.6, 0.1], [0.9, 0.9], [0.1, 0.2]], [True, False, True]) == [0, 2]


@pytest.mark.parametrize("seed", range(8))
def test_matching_by_loops(seed):
    random = np.random.default_rng(seed)
    objects, rows = random.integers(1, 9), random.integers(1, 30)
    overlaps = random.uniform(0, 1, (3, objects, rows))
    counts = random.integers(0, objects + 1, 3)
    valid = np.arange(objects) < counts[:, None]
    index, positive = match_priors(torch.tensor(overlaps), torch.tensor(valid), 0.6)
    for i, count in enumerate(counts):
        expected = naive.match(overlaps[i, :count], 0.6) if count else [None] * rows
        found = [k if p else None for k, p in zip(index[i].tolist(), positive[i].tolist())]
        assert found == expected
        wanted = overlaps[i, :count].argmax(axis=1)
        assert all(positive[i, prior] for prior in wanted)  # every object's best prior box is one
        assert len(set(found) - {None}) >= len(set(wanted))


# Hard negatives


def chosen(losses, positive, ratio):
    mask = hard_negatives(torch.tensor(losses), torch.tensor(positive), ratio)
    return [row.nonzero().flatten().tolist() for row in mask]


def test_hard_negatives_by_hand():
    losses = [[5.0, 1.0, 4.0, 2.0, 3.0], [1.0, 2.0, 9.0, 3.0, 4.0]]
    positive = [[True, False, False, False, False], [False] * 5]
    assert chosen(losses, positive, 2.0) == [[2, 4], []]
    assert chosen(losses, positive, 3.0) == [[2, 3, 4], []]
    # At most all but one, in whose order the objects come last.
    assert chosen(losses, positive, 50.0) == [[1, 2, 3, 4], []]
    assert chosen(losses, positive, 0.0) == [[], []]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ratio", [1.0, 3.0, 7.0])
def test_hard_negatives_by_loops(seed, ratio):
    random = np.random.default_rng(seed)
    losses = random.exponential(1, (4, 40))
    positive = random.uniform(size=losses.shape) < random.uniform(0, 0.3, (4, 1))
    mask = hard_negatives(torch.tensor(losses), torch.tensor(positive), ratio).numpy()
    for i in range(4):
        assert set(np.flatnonzero(mask[i])) == naive.hard_negatives(losses[i], positive[i], ratio)
        assert mask[i].sum() == min(ratio * positive[i].sum(), (~positive[i]).sum(), 39)
        left = ~mask[i] & ~positive[i]
        if mask[i].any() and left.any():
            assert losses[i][mask[i]].min() >= losses[i][left].max()


def test_hard_negatives_carry_no_gradient():
    losses = torch.rand(1, 4, requires_grad=True)
    assert not hard_negatives(losses, torch.tensor([[True, False, False, False]]), 1.0).requires_grad


# The losses


def case(seed=0, images=3, rows=30, share=0.1):
    """Random predictions, and what they should be."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, K, (images, rows))
    labels[random.uniform(size=labels.shape) > share] = K
    logits, deltas = random.normal(0, 2, (images, rows, K + 1)), random.normal(0, 2, (images, rows, 4))
    wanted = random.normal(0, 2, (images, rows, 4))
    return logits, deltas, labels, wanted


def losses_of(logits, deltas, labels, wanted, ratio=3.0):
    classes = torch.as_tensor(labels)
    targets = Targets(classes, torch.zeros(*classes.shape, 4), classes != K)
    return multibox_losses(
        *(torch.as_tensor(x) for x in (logits, deltas)), targets, torch.as_tensor(wanted), ratio
    )


@pytest.mark.parametrize("ratio", [1.0, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_losses_by_loops(seed, ratio):
    arguments = case(seed)
    classes, boxes, _ = naive.multibox(*arguments, K, ratio)
    terms = losses_of(*arguments, ratio)
    assert list(terms) == ["loss_cls", "loss_box_reg"]
    assert terms["loss_cls"].item() == pytest.approx(classes, rel=1e-12)
    assert terms["loss_box_reg"].item() == pytest.approx(boxes, rel=1e-12)
    assert classes > 0 and boxes > 0


def test_gradients_are_where_rows_count():
    logits, deltas, labels, wanted = case()
    _, _, selected = naive.multibox(logits, deltas, labels, wanted, K, 3.0)
    logits, deltas = (torch.tensor(x, requires_grad=True) for x in (logits, deltas))
    sum(losses_of(logits, deltas, labels, wanted).values()).backward()
    for i, rows in enumerate(selected):
        assert set(logits.grad[i].any(dim=1).nonzero().flatten().tolist()) == rows
        assert torch.equal(deltas.grad[i].any(dim=1), torch.tensor(labels[i] != K))


def test_order_of_images_and_of_rows_does_not_matter():
    arguments = case(images=4)
    random = np.random.default_rng(0)
    images, rows = random.permutation(4), random.permutation(30)
    expected = losses_of(*arguments)
    for changed in ([x[images] for x in arguments], [x[:, rows] for x in arguments]):
        for name, term in losses_of(*changed).items():
            torch.testing.assert_close(term, expected[name])


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_objects_and_nothing_else(share):
    logits, deltas, labels, wanted = case(share=share)
    logits, deltas = (torch.tensor(x, requires_grad=True) for x in (logits, deltas))
    terms = losses_of(logits, deltas, labels, wanted)
    sum(terms.values()).backward()
    for tensor in (*terms.values(), logits.grad, deltas.grad):
        assert tensor.isfinite().all() and bool(tensor.any()) == (share > 0)


def test_one_image_without_objects_adds_nothing():
    logits, deltas, labels, wanted = case(images=2)
    labels[1] = K
    together = losses_of(logits, deltas, labels, wanted)
    alone = losses_of(logits[:1], deltas[:1], labels[:1], wanted[:1])
    for name, term in together.items():
        torch.testing.assert_close(term, alone[name])


def test_nothing_waits_for_the_device():
    arguments = [torch.tensor(x) for x in case()]
    iou, valid = torch.rand(2, 3, 10), torch.ones(2, 3, dtype=torch.bool)
    with no_synchronization():
        match_priors(iou, valid, 0.5)
        losses_of(*arguments)
