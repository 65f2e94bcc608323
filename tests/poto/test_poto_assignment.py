"""Qualities, regions, both assignments, against loops, all permutations, and scipy on all locations."""

import itertools
import sys
from unittest import mock

import naive_poto as naive
import numpy as np
import pytest
import torch
from distill_d2.projects.poto.assignment import (
    best_assignment,
    inside,
    match_quality,
    near_center,
    one_to_many,
    one_to_one,
)

from distill_d2.testing.synchronization import no_synchronization


def squares(*rows):
    """Anchors of (x, y, stride)."""
    rows = torch.tensor(rows, dtype=torch.float32)
    center, half = rows[:, :2], rows[:, 2:] / 2
    return torch.cat([center - half, center + half], dim=1)


def grid(height, width, stride):
    cells = itertools.product(range(height), range(width))
    return squares(*[((x + 0.5) * stride, (y + 0.5) * stride, stride) for y, x in cells])


def test_quality_that_is_not_a_number():
    nan = float("nan")
    found = match_quality(torch.tensor([[nan, 1.0, 0.0]]), torch.tensor([[0.5, nan, 1.0]]), 0.5)
    assert found.tolist() == [[0.0, 0.0, pytest.approx(0.5**0.5)]]


# Regions


def test_a_border_is_outside():
    box, points = torch.tensor([[0.0, 0.0, 40.0, 40.0]]), squares((32, 20, 8), (31.5, 20, 8), (20, 8, 8))
    assert near_center(box, points, 1.5).tolist() == [[False, True, False]]
    points = squares((40, 20, 8), (0, 20, 8), (20, 39.5, 8))
    assert inside(box, points).tolist() == [[False, False, True]]


@pytest.mark.parametrize("radius", [0.5, 1.5, 3.0])
def test_regions_by_loops(radius):
    random = np.random.default_rng(0)
    anchors = torch.cat([grid(8, 10, 8), grid(4, 5, 16), grid(2, 3, 32)])
    corner = random.uniform(0, 40, (12, 2))
    boxes = np.concatenate([corner, corner + random.uniform(0, 40, (12, 2))], axis=1)
    boxes = torch.tensor(boxes, dtype=torch.float32)
    near = near_center(boxes, anchors, radius)
    expected = [[naive.is_near(b, a, radius) for a in anchors.tolist()] for b in boxes.tolist()]
    assert near.tolist() == expected and near.any() and not near.all()
    expected = [[naive.is_inside(b, a) for a in anchors.tolist()] for b in boxes.tolist()]
    assert inside(boxes, anchors).tolist() == expected
    assert inside(boxes[:0], anchors).shape == near_center(boxes[:0], anchors, radius).shape == (0, 106)


# One to one


@pytest.mark.parametrize("counts", [(0,), (0, 0), (0, 2), (2, 0), (1, 0, 3)])
def test_images_without_objects(counts):
    random = np.random.default_rng(1)
    found = one_to_one([torch.tensor(random.uniform(size=(g, 7))) for g in counts])
    assert found.images.tolist() == [image for image, g in enumerate(counts) for _ in range(g)]
    assert found.objects.tolist() == list(range(sum(counts)))
    assert all(part.shape == (sum(counts),) and part.dtype == torch.int64 for part in found)


@pytest.mark.parametrize("seed", range(6))
def test_one_to_one_by_all_permutations(seed):
    random = np.random.default_rng(seed)
    shapes = [(1, 6), (2, 5), (3, 7), (4, 6), (4, 4), (5, 3)]
    batch = [random.uniform(size=shape) for shape in shapes]
    batch = [np.where(random.uniform(size=q.shape) < 0.4, -1.0, q).astype(np.float32) for q in batch]
    found = one_to_one([torch.from_numpy(q) for q in batch])
    before = 0
    for image, q in enumerate(batch):
        mine = found.images == image
        objects, rows = found.objects[mine].numpy() - before, found.rows[mine].numpy()
        assert len(set(objects)) == len(set(rows)) == len(rows) == min(q.shape)
        assert q[objects, rows].sum() == pytest.approx(naive.best_sum(q), abs=1e-6)
        before += len(q)


@pytest.mark.parametrize("outside", [0.0, 0.5, 0.95, 1.0])
def test_as_scipy_chooses_among_all_locations(outside):
    """Among equal ones too: outside of the regions all are -1."""
    from scipy.optimize import linear_sum_assignment

    random = np.random.default_rng(0)
    for _ in range(40):
        shape = random.integers(1, 12), random.integers(12, 60)
        q = random.uniform(size=shape)
        q = np.where(random.uniform(size=shape) < outside, -1.0, q).astype(np.float32)
        found = one_to_one([torch.from_numpy(q)])
        pairs = zip(found.objects.tolist(), found.rows.tolist())
        assert sorted(pairs) == list(zip(*linear_sum_assignment(q, maximize=True)))


def test_numbers_that_leave_the_device():
    """One transfer for all images, of the G best locations of each of G objects."""
    qualities, copied = [torch.rand(g, 50) for g in (3, 0, 6)], []
    to_host, as_numpy = torch.Tensor.cpu, torch.Tensor.numpy

    def cpu(tensor):
        copied.append(tensor.numel())
        return to_host(tensor)

    with no_synchronization(), mock.patch.multiple(torch.Tensor, cpu=cpu, numpy=as_numpy):
        one_to_one(qualities)
    assert copied == [2 * (3 * 3 + 6 * 6)]


def test_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match="the training of POTO needs scipy: pip install scipy"):
        best_assignment(np.zeros((1, 1)), np.zeros((1, 1), np.int64))


# One to many


def test_one_to_many_of_no_objects():
    found = one_to_many(torch.zeros(0, 5), torch.zeros(0, 5, dtype=torch.bool), [4, 1], 9)
    assert found.tolist() == [-1] * 5 and found.dtype == torch.int64


@pytest.mark.parametrize("topk", [2, 3, 9])
@pytest.mark.parametrize("seed", range(4))
def test_one_to_many_by_loops(seed, topk):
    """The coarser levels have fewer locations than candidates."""
    random = np.random.default_rng(seed)
    sizes = [20, 8, 2]
    values = random.uniform(size=(8, 30)) ** 6
    allowed = random.uniform(size=values.shape) < 0.8
    expected = naive.auxiliary(values, allowed, sizes, topk)
    with no_synchronization():
        found = one_to_many(torch.tensor(values), torch.tensor(allowed), sizes, topk)
    assert [None if g < 0 else g for g in found.tolist()] == expected and len(set(expected)) > 2
