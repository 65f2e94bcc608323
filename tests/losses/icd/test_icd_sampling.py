"""Slots and their description: counts, fakes like the prior, and the naive version's numbers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from icd_case import Case
from naive_icd import NaiveICD, Slots, queries_from_slots

from distill_d2.losses.icd.descriptor import describe, descriptor_dim
from distill_d2.losses.icd.sampling import BoxPrior, GroundTruth, SlotSampler

PRIOR = BoxPrior(
    np.array([0.5, 0.3, 0.0, 0.2]),
    np.array([[0.1, 0.3], [0.25, 0.15], [0.5, 0.5], [0.05, 0.05]]),
    np.array([[0.02, 0.05], [0.03, 0.01], [0.1, 0.1], [0.01, 0.005]]),
)
SIZES = ((60, 90), (300, 700), (480, 128))


def ground_truth(count, size=(60, 90), seed=0):
    random = np.random.default_rng(seed)
    corner = random.uniform(0, 0.5, (count, 2))
    boxes = np.hstack([corner, corner + random.uniform(0.05, 0.5, (count, 2))])
    return GroundTruth(boxes * np.tile(size[::-1], 2), random.integers(0, 4, count), size)


def generator(seed=0):
    return np.random.default_rng(seed)


# Counts


@pytest.mark.parametrize("n, k", [(0, 1), (1, 6), (5, 30), (49, 294), (50, 300), (200, 300), (301, 301)])
def test_relative_slots(n, k):
    sampler = SlotSampler(BoxPrior.uniform(3))
    assert sampler.num_slots(n) == k
    slots = sampler.sample([ground_truth(n)], generator())
    assert (slots.filled, slots.real, slots.boxes.shape) == ([k], [n], (1, k, 4))


# Real instances


def test_all_real_instances_come_first():
    images = [ground_truth(3, SIZES[0]), ground_truth(0, SIZES[1]), ground_truth(6, SIZES[2], seed=1)]
    slots = SlotSampler(PRIOR, ratio=1.0, max_labels=5).sample(images, generator())
    assert (slots.real, slots.filled) == ([3, 0, 6], [5, 1, 6])
    for index, image in enumerate(images):
        n, k, size = len(image.boxes), slots.filled[index], np.tile(image.size[::-1], 2)
        np.testing.assert_allclose(slots.boxes[index, :n] * size, image.boxes, rtol=1e-5)
        np.testing.assert_array_equal(slots.classes[index, :n], image.classes)
        np.testing.assert_array_equal(slots.is_real[index], np.arange(6) < n)
        np.testing.assert_array_equal(slots.is_padding[index], np.arange(6) >= k)
        for values in (slots.boxes, slots.points, slots.ltrb, slots.scales, slots.classes):
            assert not values[index, k:].any()


def test_points_stay_in_their_boxes_off_the_center():
    slots = SlotSampler(PRIOR, rule="fixed", num_labels=500).sample([ground_truth(50)], generator())
    assert (slots.ltrb > 0).all()
    sides = slots.boxes[..., 2:] - slots.boxes[..., :2]
    np.testing.assert_allclose(slots.ltrb[..., :2] + slots.ltrb[..., 2:], sides, atol=1e-6)
    shift = (slots.points - (slots.boxes[..., 2:] + slots.boxes[..., :2]) / 2) / sides
    assert 0.29 < np.abs(shift).max() <= 0.3 + 1e-5 and abs(shift.mean()) < 0.02


# Fakes


@pytest.fixture(scope="module")
def fakes():
    sampler = SlotSampler(PRIOR, rule="fixed", num_labels=20000)
    return sampler.sample([ground_truth(0)], generator(1))


def test_fakes_have_the_frequencies_of_the_prior(fakes):
    frequencies = np.bincount(fakes.classes[0], minlength=4) / 20000
    deviation = np.sqrt(PRIOR.probability * (1 - PRIOR.probability) / 20000)
    assert (np.abs(frequencies - PRIOR.probability) <= 4 * deviation).all()


@pytest.mark.parametrize("index", [0, 1, 3])
def test_fakes_have_the_sizes_of_the_prior(fakes, index):
    whole = (fakes.boxes[0] > 0).all(-1) & (fakes.boxes[0] < 1).all(-1)  # not cut at the border
    boxes = fakes.boxes[0][whole & (fakes.classes[0] == index)]
    sizes = boxes[:, 2:] - boxes[:, :2]
    mean, std = PRIOR.mean[index], PRIOR.std[index]
    np.testing.assert_allclose(sizes.mean(0), mean, atol=(5 / np.sqrt(len(boxes)) + 0.02) * std.max())
    np.testing.assert_allclose(sizes.std(0), 0.959 * std, rtol=0.06)  # clipped at two deviations
    assert (np.abs(sizes - mean) <= 2 * std + 1e-6).all()


def test_sizes_of_fakes_are_bounded():
    wide = BoxPrior(np.ones(1), np.full((1, 2), 0.35), np.full((1, 2), 1.0))
    slots = SlotSampler(wide, rule="fixed", num_labels=500).sample([ground_truth(0)], generator())
    sizes = slots.boxes[..., 2:] - slots.boxes[..., :2]
    assert sizes.max() == pytest.approx(0.7, abs=1e-6)
    assert sizes.min() == pytest.approx(2e-3, abs=1e-6)
    centers = (slots.boxes[..., 2:] + slots.boxes[..., :2])[sizes < 0.03] / 2
    assert centers.min() >= 0.03 - 1e-6 and centers.max() <= 0.97 + 1e-6


def test_fakes_change_with_the_iteration_and_the_seed_and_repeat():
    case = Case()

    def points(iteration, seed=0):
        torch.manual_seed(seed)
        return case.loss.read(case.views()[1], case.batch(iteration))[1].points

    assert torch.equal(points(3), points(3))
    assert not torch.equal(points(3), points(4))
    assert not torch.equal(points(3), points(3, seed=1))


# The prior


STATISTICS = SimpleNamespace(counts=np.array([3, 0, 1]), mean=PRIOR.mean[:3], std=PRIOR.std[:3])


def test_prior_of_statistics():
    prior = BoxPrior.of(STATISTICS, 4)  # a class more than the data have
    np.testing.assert_allclose(prior.probability, [0.75, 0, 0.25, 0])
    np.testing.assert_allclose(prior.mean, [*PRIOR.mean[:3], [0.2, 0.2]])
    np.testing.assert_allclose(prior.std, [*PRIOR.std[:3], [0.2, 0.2]])


@pytest.mark.parametrize("classes_uniform", [False, True])
@pytest.mark.parametrize("boxes_uniform", [False, True])
def test_loss_draws_from_the_training_data(classes_uniform, boxes_uniform):
    case = Case(
        num_classes=3,
        statistics=STATISTICS,
        uniform_sample_class=classes_uniform,
        uniform_sample_box=boxes_uniform,
    )
    prior, uniform = case.loss.queries.sampler.prior, BoxPrior.uniform(3)
    measured = BoxPrior.of(STATISTICS, 3)
    expected = uniform if classes_uniform else measured
    np.testing.assert_allclose(prior.probability, expected.probability)
    expected = uniform if boxes_uniform else measured
    np.testing.assert_allclose(prior.mean, expected.mean)
    np.testing.assert_allclose(prior.std, expected.std)


# The naive version


def naive_queries(images, sampler, draws):
    counts = [sampler.num_slots(len(image.boxes)) for image in images]
    ends = np.cumsum(counts)[:-1]
    normal = np.hstack([np.zeros_like(draws.sizes), draws.sizes])
    parts = [np.split(a, ends) for a in (draws.classes, normal, draws.centers, draws.jitter)]
    tables = [np.hstack([np.zeros((4, 2)), table]) for table in (PRIOR.mean, PRIOR.std)]
    return queries_from_slots(
        [Slots(*image) for image in zip(*parts)],
        [torch.tensor(image.boxes).float() for image in images],
        [image.classes for image in images],
        [image.size for image in images],
        mean_std=np.stack(tables, axis=1),
        sample_range=sampler.jitter,
    )


@pytest.mark.parametrize("last_image", [False, True], ids=["own_size", "last_image_scale"])
@pytest.mark.parametrize("counts", [(2, 0, 5), (0, 0, 0), (3,), (1, 12, 2)])
def test_naive_slots_and_descriptors(counts, last_image):
    sampler = SlotSampler(PRIOR, ratio=3.0, max_labels=8, jitter=0.2, last_image_scale=last_image)
    images = [ground_truth(n, size, seed=n) for n, size in zip(counts, SIZES)]
    total = sum(sampler.num_slots(n) for n in counts)
    draws = sampler.draw(total, generator(7))
    slots, naive = sampler.place(images, draws), naive_queries(images, sampler, draws)
    np.testing.assert_array_equal(slots.classes, naive.classes)
    np.testing.assert_array_equal(slots.is_real, naive.is_real)
    np.testing.assert_array_equal(slots.is_padding, naive.is_padding)
    for name in ("boxes", "points", "ltrb"):
        np.testing.assert_allclose(getattr(slots, name), getattr(naive, name), atol=1e-6)

    queries, sizes = slots.to(torch.device("cpu")), [image.size for image in images]
    for with_scale in (True, False):
        settings = {"NUM_CLASSES": 4, "ADD_SCALE_INDICATOR": with_scale, "HIDDEN_DIM": 8}
        icd = NaiveICD({}, {**settings, "ATT_HEADS": 2, "ATT_LAYERS": 1}, {}, reference_bugs=last_image)
        actual = describe(queries, 4, with_scale)
        assert actual.dtype == torch.float32 and actual.shape[-1] == descriptor_dim(4, with_scale)
        torch.testing.assert_close(actual, icd.descriptor(naive, sizes), atol=1e-5, rtol=0)
