"""Shares of a dataset: training and validation images where no list says which is which."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Share:
    """The images from one fraction of a shuffled dataset to another.

    Shares of the same seed that meet, such as 0 to 0.8 and 0.8 to 1, are disjoint and complete. The order
    depends on the seed and the ids alone, not on a folder's order, the machine or a random number generator.

    Attributes:
        start, stop: fractions, 0 to 1.
        seed: another one shuffles in another way.
    """

    start: float
    stop: float
    seed: int = 0

    @classmethod
    def of_entry(cls, name: str, value: Mapping[str, Any]) -> Share:
        """Of {FRACTION: [start, stop], SEED: number}.

        Raises:
            ValueError: it has other keys or values.
        """
        fraction, seed = value.get("FRACTION", ()), value.get("SEED", 0)
        if set(value) - {"FRACTION", "SEED"} or not _is_pair(fraction) or type(seed) is not int:
            raise ValueError(
                f"DATASETS.CUSTOM: SPLIT of '{name}' is {dict(value)}; expected {{FRACTION: [0.0, 0.8], "
                "SEED: 1}: the images between two fractions of all, which SEED shuffles"
            )
        start, stop = map(float, fraction)
        if not 0 <= start < stop <= 1:
            raise ValueError(
                f"DATASETS.CUSTOM: SPLIT of '{name}' has FRACTION {list(fraction)}; expected two numbers from 0 "
                "to 1, the first one smaller"
            )
        return cls(start, stop, seed)

    def of(self, ids: Iterable[str]) -> set[str]:
        """Those of the ids that belong to the share. Raises ValueError if there are ids, and none does."""
        everything = sorted(set(ids), key=self._rank)
        first, last = (round(fraction * len(everything)) for fraction in (self.start, self.stop))
        if everything and first == last:
            raise ValueError(
                f"SPLIT {self} of {len(everything)} images holds none of them; add images, or give training and "
                "validation the same ones without SPLIT"
            )
        return set(everything[first:last])

    def _rank(self, key: str) -> tuple[bytes, str]:
        text = f"{self.seed}/{key}".encode(errors="surrogateescape")
        return hashlib.sha256(text).digest(), key

    def __str__(self) -> str:
        return f"{{FRACTION: [{self.start:g}, {self.stop:g}], SEED: {self.seed}}}"


def _is_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and [type(x) in (int, float) for x in value] == [True, True]
