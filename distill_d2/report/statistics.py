"""What a few runs say about a gain: intervals of Student's t, and Holm's correction for several comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit


@dataclass(frozen=True)
class Interval:
    """Where a mean gain lies.

    Attributes:
        low, high: ends of the interval, in the unit of the gains; nan: it is not known.
        p: of the hypothesis that the true gain is 0, two-sided; nan: it is not known.
        df: degrees of freedom of a t interval; nan of others.
    """

    low: float
    high: float
    p: float
    df: float = math.nan


UNKNOWN = Interval(math.nan, math.nan, math.nan)


def paired_interval(gains: Sequence[float], level: float = 0.95) -> Interval:
    """Student's interval of the mean of paired differences, one per seed; UNKNOWN for fewer than two."""
    if len(gains) < 2:
        return UNKNOWN
    error = np.std(gains, ddof=1) / math.sqrt(len(gains))
    return _around(float(np.mean(gains)), float(error), len(gains) - 1, level)


def welch_interval(values: Sequence[float], others: Sequence[float], level: float = 0.95) -> Interval:
    """Welch's interval of the difference of the means of two independent samples (B. L. Welch, Biometrika 34,
    1947), for ``values`` minus ``others``; UNKNOWN if one has fewer than two."""
    if min(len(values), len(others)) < 2:
        return UNKNOWN
    first, second = (np.var(part, ddof=1) / len(part) for part in (values, others))
    freedom = len(values) - 1, len(others) - 1
    spread = first**2 / freedom[0] + second**2 / freedom[1]
    df = (first + second) ** 2 / spread if spread else sum(freedom)
    gain = float(np.mean(values) - np.mean(others))
    return _around(gain, math.sqrt(first + second), float(df), level)


def _around(gain: float, error: float, df: float, level: float) -> Interval:
    half = float(stdtrit(df, 0.5 + level / 2)) * error
    if error:
        p = 2 * float(stdtr(df, -abs(gain) / error))
    else:
        p = 0.0 if gain else 1.0
    return Interval(gain - half, gain + half, p, df)


def holm(p_values: Sequence[float]) -> list[float]:
    """p values of several comparisons, adjusted so that the chance of even one false finding among them stays at
    the level to which each is compared (S. Holm, Scandinavian Journal of Statistics 6, 1979).

    Args:
        p_values: nan: no comparison was made; it stays nan and does not count.
    """
    adjusted = [math.nan] * len(p_values)
    known = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[index] = largest
    return adjusted
