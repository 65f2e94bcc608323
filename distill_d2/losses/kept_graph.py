"""Whether a backward pass leaves the graph to another one, for functions that give away what they keep for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

_kept = False  # of all threads: a GPU's backward pass has one of its own


@contextlib.contextmanager
def kept_graph() -> Iterator[None]:
    """Inside, backward passes with ``retain_graph`` leave such functions as they are."""
    global _kept
    before, _kept = _kept, True
    try:
        yield
    finally:
        _kept = before


def is_graph_kept() -> bool:
    """Whether the backward pass that runs now is inside ``kept_graph``."""
    return _kept
