"""Golden fixtures through the public classes of this package, every array compared; a table for each file."""

from __future__ import annotations

import sys
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from tabulate import tabulate

from . import Fixture, FixtureError, GoldenKind, load_kinds

PASS, FAIL, UNREADABLE = 0, 1, 2


def check_files(paths: Sequence[str]) -> int:
    """Check files and print their tables; the worst of PASS, FAIL and UNREADABLE."""
    torch.set_num_threads(1)  # the order of additions, hence the last digits, is the same everywhere
    return max(check_file(path) for path in paths)


def check_file(path: str) -> int:
    """Check one file and print its table; PASS, FAIL or UNREADABLE."""
    try:
        arrays = read_arrays(path)
        return check_kinds(path, kinds_of(arrays), arrays)
    except FixtureError as error:
        print(f"{path}: {error}", file=sys.stderr)
        return UNREADABLE


# AttributeError and TypeError: a single array, from an .npy file.
_READ_ERRORS = (
    *(OSError, ValueError, EOFError, AttributeError, TypeError),
    *(zipfile.BadZipFile, zlib.error),
)


def read_arrays(path: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; pickled objects are not read.

    Raises:
        FixtureError: it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise FixtureError("does not exist") from None
    except _READ_ERRORS as error:
        raise FixtureError(f"cannot be read as an .npz file of arrays: {error}") from error


def kinds_of(arrays: dict[str, np.ndarray]) -> list[GoldenKind]:
    """The kinds that a file is of.

    Raises:
        FixtureError: none is known.
    """
    known = load_kinds()
    fitting = [kind for kind in known.values() if kind.fits(arrays)]
    if not fitting:
        listing = "\n".join(f"  {name}: {', '.join(kind.holds)}" for name, kind in known.items())
        raise FixtureError(
            f"is not a fixture of a known kind. The known kinds, and the arrays that they hold:\n{listing}\n"
            f"It holds {listing_of(sorted(arrays)) or 'nothing'}"
        )
    return fitting


def check_kinds(path: str, kinds: list[GoldenKind], arrays: dict[str, np.ndarray]) -> int:
    """Check a file as each of the kinds that it is of, and print a table of each; PASS or FAIL.

    Raises:
        FixtureError: it lacks an array of some kind.
    """
    fixtures = {kind.name: kind.run(arrays) for kind in kinds}
    statuses = []
    for name, fixture in fixtures.items():
        print(f"{path}: {name}")
        print_table(fixture)
        statuses.append(print_verdict(name, fixture))
    unused = set.intersection(*(set(fixture.unused) for fixture in fixtures.values()))
    if unused:
        print(f"{path}: not used: {listing_of(sorted(unused))}")
    return max(statuses)


def print_verdict(name: str, fixture: Fixture) -> int:
    failed = [c.name for c in fixture.comparisons if not c.passed]
    if failed or not fixture.comparisons:
        print(f"{name}: FAIL: {len(failed)} of {len(fixture.comparisons)} arrays\n")
        return FAIL
    print(f"{name}: pass\n")
    return PASS


def print_table(fixture: Fixture) -> None:
    rows = [
        [
            c.name,
            "x".join(map(str, c.expected.shape)) or "scalar",
            f"{c.absolute_error:.1e}" if c.same_shape else "-",
            f"{c.relative_error:.1e}" if c.same_shape else "-",
            f"{c.atol:.1g} + {c.rtol:.1g} x",
            "pass"
            if c.passed
            else "FAIL"
            if c.same_shape
            else f"FAIL: the result has shape {c.actual.shape}",
        ]
        for c in fixture.comparisons
    ]
    header = ["array", "shape", "absolute error", "relative error", "tolerance", ""]
    print(tabulate(rows, headers=header, tablefmt="pipe", disable_numparse=True))


def listing_of(names: list[str], most: int = 20) -> str:
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
