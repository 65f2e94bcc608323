"""Intervals and corrections against numbers computed by hand, and against what they promise."""

import math

import numpy as np
import pytest

from distill_d2.report.statistics import holm, paired_interval, welch_interval


def test_paired_interval_by_hand():
    """Gains 1, 2, 3: mean 2, standard error 1 / sqrt(3), and 4.3027 of them at 2 degrees of freedom; there
    P(T > t) is 1/2 - t / (2 sqrt(2 + t^2))."""
    found = paired_interval([1.0, 2.0, 3.0])
    half = 4.302652729911275 / math.sqrt(3)
    assert (found.low, found.high, found.df) == (pytest.approx(2 - half), pytest.approx(2 + half), 2)
    t = 2 * math.sqrt(3)
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t**2))


def test_equal_gains():
    assert (paired_interval([1.5, 1.5]).low, paired_interval([1.5, 1.5]).p) == (1.5, 0.0)
    assert paired_interval([0.0, 0.0]).p == 1.0


def test_one_seed_has_no_interval():
    for found in (paired_interval([2.0]), welch_interval([2.0], [1.0, 3.0])):
        assert math.isnan(found.low) and math.isnan(found.high) and math.isnan(found.p)


def test_welch_by_hand():
    """Variances 1 and 4 of three values each: error sqrt(5/3), 4 (5/3)^2 / (2 (1/9 + 16/9)) degrees of freedom."""
    found = welch_interval([11.0, 12.0, 13.0], [8.0, 10.0, 12.0])
    assert found.df == pytest.approx(50 / 17)
    assert (found.low + found.high) / 2 == pytest.approx(2.0)
    half = 3.2187 * math.sqrt(5 / 3)  # the t quantile at 2.941 degrees of freedom
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=1e-4)


def test_holm_by_hand():
    """Times 4, 3, 2, 1 from the smallest, never falling, at most 1; what was not tested does not count."""
    adjusted = holm([0.01, 0.04, math.nan, 0.03, 0.005])
    assert adjusted[:2] + adjusted[3:] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert math.isnan(adjusted[2])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds):
    samples = np.random.default_rng(0).normal(1.0, 2.0, (1500, 2, seeds))
    for intervals in (
        [paired_interval(first) for first, _ in samples],
        [welch_interval(first, second + 0.0) for first, second in samples],
    ):
        truth = 1.0 if intervals[0].df == seeds - 1 else 0.0
        covered = np.mean([found.low <= truth <= found.high for found in intervals])
        assert 0.935 <= covered <= 0.975  # Welch's is a little wide for so few
