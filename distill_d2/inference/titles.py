"""Short names of runs."""

from __future__ import annotations

import os
from collections.abc import Sequence


def titles_of(runs: Sequence[str]) -> list[str]:
    """The ends of the runs' paths, as short as they are different: "teacher" and "pkd" of output/teacher and
    output/pkd.pth, "a/pkd" and "b/pkd" of a/pkd and b/pkd; of a path that is there twice, with a number."""
    parts = [_without_suffix(os.path.abspath(os.path.expanduser(run))).split(os.sep) for run in runs]
    for length in range(1, max(map(len, parts))):
        titles = ["/".join(each[-length:]) for each in parts]
        if len(set(titles)) == len(set(map(tuple, parts))):
            break
    counts: dict[str, int] = {}
    numbered = []
    for title in titles:
        counts[title] = counts.get(title, 0) + 1
        numbered.append(title if counts[title] == 1 else f"{title} ({counts[title]})")
    return numbered


def _without_suffix(path: str) -> str:
    stem, suffix = os.path.splitext(path)
    return stem if suffix in (".yaml", ".yml", ".py", ".pth") else path
