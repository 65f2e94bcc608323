"""Fixtures for tools/check_golden.py, and what it says of their arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def write(folder: Path, arrays: dict[str, np.ndarray], name: str = "fixture.npz") -> str:
    """The path of a new fixture of these arrays."""
    path = folder / name
    np.savez(path, **arrays)
    return str(path)


def compared(output: str, verdict: str) -> list[str]:
    """Names of the arrays of which the tool printed this verdict, "pass" or "FAIL"."""
    return [line.split()[1] for line in output.splitlines() if line.endswith(f"| {verdict} |")]
