"""Golden fixtures: what independent implementations returned for fixed inputs, in .npz files.

A kind of fixture is one file of this folder; nothing else needs an edit:

    @golden_kind(holds=["student/*", "teacher/*", "my_loss/*"], rtol=1e-5, atol=1e-7)
    def my_loss(fixture: Fixture) -> None:
        student = fixture.tensor("student/p3").requires_grad_()
        loss = ...  # through the public classes of distill_d2
        fixture.compare("my_loss/loss", loss)

A file is of every kind whose ``holds`` patterns all match some of its arrays; its name does not matter. The
arrays give sizes, levels and seeds, so that other files of the same layout work too.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Callable

import numpy as np
import torch


class FixtureError(Exception):
    """A file is not a fixture of its kind: it cannot be read, or lacks an array."""


@dataclass(frozen=True)
class Comparison:
    """One array, as the fixture has it and as distill_d2 computed it."""

    name: str
    expected: np.ndarray
    actual: np.ndarray
    rtol: float
    atol: float

    @property
    def same_shape(self) -> bool:
        return self.expected.shape == self.actual.shape

    @property
    def passed(self) -> bool:
        """|actual - expected| <= atol + rtol |expected|; infinities and NaN in the same places."""
        return self.same_shape and np.allclose(
            self.actual, self.expected, self.rtol, self.atol, equal_nan=True
        )

    @property
    def absolute_error(self) -> float:
        """The largest |actual - expected|; infinite where only one of them is finite."""
        return float(self._errors().max(initial=0.0))

    @property
    def relative_error(self) -> float:
        """The largest |actual - expected| / |expected|, where expected is not 0."""
        scale = np.abs(self.expected)
        usable = np.isfinite(scale) & (scale > 0)
        return float((self._errors()[usable] / scale[usable]).max(initial=0.0))

    def _errors(self) -> np.ndarray:
        both = np.isfinite(self.actual) & np.isfinite(self.expected)
        same = (self.actual == self.expected) | (np.isnan(self.actual) & np.isnan(self.expected))
        errors = np.where(same, 0.0, np.inf)
        errors[both] = np.abs(self.actual[both] - self.expected[both])
        return errors


class Fixture:
    """The arrays of one file, and the comparisons made with them.

    Attributes:
        arrays: all arrays by name.
        comparisons: what ``compare`` was given.
    """

    def __init__(self, arrays: dict[str, np.ndarray], rtol: float, atol: float):
        self.arrays = arrays
        self.comparisons: list[Comparison] = []
        self._tolerance = (rtol, atol)
        self._read = set()

    def __getitem__(self, name: str) -> np.ndarray:
        """Raises FixtureError if there is no such array."""
        if name not in self.arrays:
            raise FixtureError(f"has no array '{name}'; it has {', '.join(sorted(self.arrays))}")
        self._read.add(name)
        return self.arrays[name]

    def names(self, pattern: str) -> list[str]:
        """The arrays whose names match ("student/*"), in the order of the file."""
        return [name for name in self.arrays if fnmatchcase(name, pattern)]

    def tensor(self, name: str) -> torch.Tensor:
        """A copy of an array as a tensor, floating-point numbers in float32."""
        tensor = torch.tensor(self[name])
        return tensor.float() if tensor.is_floating_point() else tensor

    def compare(
        self, name: str, actual: Any, rtol: float | None = None, atol: float | None = None
    ) -> None:
        """Compare the array ``name`` with a tensor, array or number that distill_d2 computed.

        Args:
            rtol, atol: replace those of the kind.
        """
        if isinstance(actual, torch.Tensor):
            actual = actual.detach().cpu().numpy()
        values = (np.asarray(value).astype(np.float64) for value in (self[name], actual))
        default_rtol, default_atol = self._tolerance
        rtol = default_rtol if rtol is None else rtol
        atol = default_atol if atol is None else atol
        self.comparisons.append(Comparison(name, *values, rtol=rtol, atol=atol))

    @property
    def unused(self) -> list[str]:
        """Arrays that were neither read nor compared."""
        return sorted(set(self.arrays) - self._read)


@dataclass(frozen=True)
class GoldenKind:
    """A kind of fixture: how to recognize one, and how to check it."""

    name: str
    holds: Sequence[str]
    rtol: float
    atol: float
    check: Callable[[Fixture], None]

    def fits(self, arrays: dict[str, np.ndarray]) -> bool:
        return all(any(fnmatchcase(name, pattern) for name in arrays) for pattern in self.holds)

    def run(self, arrays: dict[str, np.ndarray]) -> Fixture:
        """Check the arrays of one file.

        Raises:
            FixtureError: the file lacks an array.
        """
        fixture = Fixture(arrays, self.rtol, self.atol)
        self.check(fixture)
        return fixture


GOLDEN_KINDS: dict[str, GoldenKind] = {}


def golden_kind(*, holds: Sequence[str], rtol: float, atol: float) -> Callable:
    """Decorator: register a function that checks a Fixture, under the function's name.

    Args:
        holds: patterns of array names; every fixture of the kind has a match for each.
        rtol, atol: the tolerance that the fixture states, for arrays that name no other.
    """

    def register(check: Callable[[Fixture], None]) -> Callable[[Fixture], None]:
        name = check.__name__
        if name in GOLDEN_KINDS:
            raise ValueError(f"there are two kinds of golden fixtures named '{name}'")
        GOLDEN_KINDS[name] = GoldenKind(name, tuple(holds), rtol, atol, check)
        return check

    return register


def load_kinds() -> dict[str, GoldenKind]:
    """All kinds by name: those of the files of this folder."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return GOLDEN_KINDS
