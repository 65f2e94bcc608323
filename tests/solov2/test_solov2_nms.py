"""Non-maximum suppression: by loops, by hand, at its limits."""

import math

import naive_solov2 as naive
import numpy as np
import pytest
import torch
from distill_d2.projects.solov2.nms import mask_ious, mask_nms, matrix_nms, point_nms


def random_masks(seed, count=25, classes=2):
    """Rectangles that overlap much, and their classes."""
    random = np.random.default_rng(seed)
    masks = np.zeros((count, 12, 14), dtype=bool)
    for mask, (y, x) in zip(masks, random.integers(0, 4, (count, 2))):
        height, width = random.integers(3, 9, 2)
        mask[y : y + height, x : x + width] = True
    return torch.tensor(masks), torch.tensor(random.integers(0, classes, count))


@pytest.mark.parametrize("kernel, sigma", [("gaussian", 2.0), ("gaussian", 0.5), ("linear", 2.0)])
@pytest.mark.parametrize("seed", range(4))
def test_matrix_nms_by_loops(seed, kernel, sigma):
    masks, classes = random_masks(seed)
    factors = matrix_nms(mask_ious(masks, classes), kernel, sigma)
    expected = naive.matrix_nms(masks.numpy(), classes.tolist(), kernel, sigma)
    np.testing.assert_allclose(factors, expected, rtol=1e-5, atol=1e-6)
    assert min(expected) < 0.8 and expected[0] == 1.0


def overlapping(*pairs, count=3):
    ious = torch.zeros(count, count)
    for i, j, iou in pairs:
        ious[i, j] = iou
    return ious


@pytest.mark.parametrize("kernel", ["gaussian", "linear"])
def test_equal_masks(kernel):
    """Finite, and linear leaves one of them."""
    masks, classes = random_masks(0, count=3)
    masks = masks[[0, 0, 0, 1, 1, 2]]
    factors = matrix_nms(mask_ious(masks, classes[[0] * 6]), kernel)
    assert factors.isfinite().all() and (factors <= 1).all() and factors[0] == 1
    expected = 0.0 if kernel == "linear" else math.exp(-2)
    assert factors[[1, 2]].tolist() == pytest.approx([expected] * 2, abs=1e-6) and factors[4] < 0.2
    without = matrix_nms(mask_ious(masks[[0, 3, 5]], classes[[0] * 3]), kernel)
    if kernel == "linear":  # those that are gone make nothing else decay
        torch.testing.assert_close(factors[[0, 3, 5]], without)


@pytest.mark.parametrize("threshold", [0.3, 0.5])
@pytest.mark.parametrize("seed", range(6))
def test_mask_nms_by_loops(seed, threshold):
    masks, classes = random_masks(seed)
    kept = mask_nms(mask_ious(masks, classes), threshold).nonzero().flatten().tolist()
    expected = naive.mask_nms(masks.numpy(), classes.tolist(), threshold)
    assert kept == expected and 1 < len(kept) < 25


def test_mask_nms_of_a_chain():
    """Each overlaps the next: every other one stays."""
    count = 9
    ious = overlapping(*((i, i + 1, 0.8) for i in range(count - 1)), count=count)
    assert mask_nms(ious, 0.5).tolist() == [index % 2 == 0 for index in range(count)]
    assert mask_nms(ious, 0.8).all()  # the threshold itself is no overlap


def test_nothing_to_suppress():
    ious = mask_ious(torch.zeros(0, 4, 4, dtype=torch.bool), torch.zeros(0, dtype=torch.int64))
    assert ious.shape == (0, 0)
    assert matrix_nms(ious).shape == matrix_nms(ious, "linear").shape == (0,)
    assert mask_nms(ious, 0.5).shape == (0,) and mask_nms(ious, 0.5).dtype == torch.bool
    one = mask_ious(torch.zeros(1, 4, 4, dtype=torch.bool), torch.zeros(1, dtype=torch.int64))
    assert matrix_nms(one).item() == 1.0 and mask_nms(one, 0.5).item()


@pytest.mark.parametrize("seed", range(3))
def test_point_nms_by_loops(seed):
    scores = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    found = point_nms(scores)
    for image in range(2):
        for k in range(3):
            np.testing.assert_array_equal(found[image, k], naive.point_nms(scores[image, k].numpy()))
    assert 0.2 < (found > 0).float().mean() < 0.5
