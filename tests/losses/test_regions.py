"""Distances of feature maps and their means in objects and outside: by hand, and against the naive version."""

import naive_defeat as naive
import pytest
import torch

from distill_d2.losses.regions import distance_map, region_means
from distill_d2.testing.maps import plane

S = torch.cat([plane([1, 2], [3, 4]), plane([0, -1], [0.5, 3])], dim=1)
T = torch.cat([plane([1, 0], [3.5, 4]), plane([1, -1], [0, 0])], dim=1)
# Differences 0, 2, -0.5, 0 and -1, 0, 0.5, 3.
LITERALS = {
    ("L2", False): [[1, 4], [0.5, 9]],
    ("L2", True): [[1, 4], [0.5, 9]],
    ("L1", False): [[1, 2], [1, 3]],
    ("L1", True): [[1, 2], [1, 3]],
    ("smoothL1", False): [[0.5, 1.5], [0.25, 2.5]],
    ("smoothL1", True): [[1, 4], [1, 9]],
}


def random_maps(shape=(2, 3, 4, 5), seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) * 1.5 for _ in range(2)
    ]


# Distances


@pytest.mark.parametrize("form, inverted", LITERALS)
def test_literal_distances(form, inverted):
    found = distance_map(S, T, form, inverted=inverted)
    assert found.tolist() == [LITERALS[form, inverted]]


@pytest.mark.parametrize("form, inverted", LITERALS)
def test_gradcheck(form, inverted):
    student, teacher = random_maps(dtype=torch.float64)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: distance_map(s, teacher, form, inverted=inverted), student)


def test_l2_twice_in_one_graph():
    """What its own gradient needs is neither overwritten nor freed by another's."""
    student, teacher = random_maps()
    leaf = student.clone().requires_grad_()
    first, second = distance_map(leaf, teacher), distance_map(leaf, 2 * teacher)
    (first.sum() + 3 * second.sum()).backward()
    torch.testing.assert_close(leaf.grad, 2 * (student - teacher) + 6 * (student - 2 * teacher))


def test_l2_of_any_memory_layout():
    student, teacher = random_maps()
    leaf = student.to(memory_format=torch.channels_last).requires_grad_()
    distance_map(leaf, teacher).square().sum().backward()
    gap = (student - teacher).double()
    expected = 4 * gap * gap.square().sum(dim=1, keepdim=True)
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-5, atol=1e-5)


def test_l2_gives_the_teacher_no_gradient():
    student, teacher = (x.requires_grad_() for x in random_maps())
    distance_map(student, teacher).sum().backward()
    assert student.grad.any() and teacher.grad is None


# Means


def test_literal_means():
    """Distances 1, 4, 0.5 and 9, of two channels; halved."""
    distances = distance_map(S, T)
    mask = torch.tensor([[[1.0, 1], [0, 0]]])
    inside, outside = region_means(distances, mask, 2)
    assert inside.item() == pytest.approx(5 / 8) and outside.item() == pytest.approx(9.5 / 8)
    soft = torch.tensor([[[0.5, 0.25], [0, 1]]])
    inside, outside = region_means(distances, soft, 2)
    assert inside.item() == pytest.approx((0.5 + 1 + 9) / 7)
    assert outside.item() == pytest.approx((0.5 + 3 + 0.5) / 9)


def test_small_counts_are_taken_for_one():
    """2 C sum(M) below 1: a Gaussian's tail, one channel."""
    mask = torch.tensor([[[0.25, 0], [0, 0]]])
    inside, _ = region_means(torch.full((1, 2, 2), 8.0), mask, 1)
    assert inside.item() == pytest.approx(2.0)


@pytest.mark.parametrize("form, inverted", LITERALS)
@pytest.mark.parametrize("soft", [False, True])
def test_naive_means(form, inverted, soft):
    for seed, shape in enumerate([(1, 1, 3, 4), (3, 2, 2, 5), (2, 4, 1, 1)]):
        student, teacher = random_maps(shape, seed)
        mask = torch.rand(shape[0], *shape[2:], generator=torch.Generator().manual_seed(seed))
        mask = mask if soft else mask.round()
        distances = distance_map(student, teacher, form, inverted=inverted)
        found = region_means(distances, mask, shape[1])
        pairs = {"p3": (student.double(), teacher.double())}
        expected = naive.region_losses(pairs, {"p3": mask}, form, inverted)
        for mean, other in zip(found, expected):
            assert mean.item() == pytest.approx(other.item(), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("full", [False, True])
def test_a_region_may_be_empty(full):
    student, teacher = random_maps()
    student.requires_grad_()
    mask = torch.full((2, 4, 5), float(full))
    means = region_means(distance_map(student, teacher), mask, 3)
    whole, empty = means if full else means[::-1]
    assert whole.item() == pytest.approx(((student - teacher) ** 2).mean().item() / 2, rel=1e-5)
    (gradient,) = torch.autograd.grad(empty, student, retain_graph=True)
    assert empty == 0 and not gradient.any()
    (gradient,) = torch.autograd.grad(whole, student)
    torch.testing.assert_close(gradient, (student - teacher).detach() / student.numel())


def test_means_are_of_all_images_together():
    """Not the mean of each image's: an image of many objects counts more."""
    mask = torch.zeros(2, 1, 4)
    mask[0, 0, :3] = mask[1, 0, 0] = 1
    distances = torch.tensor([[[2.0, 2, 2, 0]], [[10, 0, 0, 4]]])
    inside, outside = region_means(distances, mask, 1)
    assert inside.item() == pytest.approx(16 / 8) and outside.item() == pytest.approx(4 / 8)
