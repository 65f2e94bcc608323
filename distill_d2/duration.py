"""How long a training takes, from the time of its parts."""

from __future__ import annotations


def expected_duration(
    steps: int, seconds_per_step: float, evaluations: int = 0, seconds_per_evaluation: float = 0.0
) -> float:
    """Seconds that a training takes."""
    return steps * seconds_per_step + evaluations * seconds_per_evaluation


def evaluations_of(max_iter: int, eval_period: int) -> int:
    """How often a run of this length is evaluated: each ``eval_period`` iterations (0: never), and at its end."""
    return 1 + ((max_iter - 1) // eval_period if eval_period > 0 else 0)


def spoken(seconds: float) -> str:
    """A duration for a reader: "40 s", "12 min", "3.4 h", "2.1 days"."""
    for unit, length in (("days", 86400), ("h", 3600)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    if seconds >= 90:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
