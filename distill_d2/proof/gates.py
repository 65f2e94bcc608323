"""What must hold before students are distilled: else a gain would prove nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .jobs import Job, mean_ap
from .rows import Pair

#: AP on val that twice the schedule may gain at most.
CONVERGED = 0.5
#: AP on val that the teacher must be above the student.
AHEAD = 4.0


@dataclass(frozen=True)
class Gate:
    """A condition, whether it holds, and what to do if it does not."""

    text: str
    holds: bool
    advice: str

    def __str__(self) -> str:
        return f"{self.text}: {'holds' if self.holds else 'does not hold'}"


def gates_of(pair: Pair, teacher: Job, alone: Sequence[Job], doubled: Sequence[Job]) -> list[Gate]:
    """The gates of a pair, by the AP on val of its finished runs."""
    seeds = [job.seed for job in doubled]
    same, longer = mean_ap([job for job in alone if job.seed in seeds]), mean_ap(doubled)
    gained, ahead = longer - same, teacher.ap() - mean_ap(alone)
    return [
        Gate(
            f"{pair.name}: twice the schedule gains the student alone {gained:+.2f} AP on val ({same:.2f} to "
            f"{longer:.2f}, seed {', '.join(map(str, seeds))}), less than {CONVERGED}",
            gained < CONVERGED,
            f"the student has not converged; raise SOLVER.MAX_ITER of configs/{pair.config(pair.alone)}",
        ),
        Gate(
            f"{pair.name}: the teacher is {ahead:+.2f} AP above the student on val ({teacher.ap():.2f}), at least "
            f"{AHEAD}",
            ahead >= AHEAD,
            f"such a teacher has nothing to give; train configs/{pair.config(pair.teacher)} longer, or make the "
            "student smaller",
        ),
    ]


def check(gates: Sequence[Gate]) -> None:
    """Raises ValueError for the gates that do not hold."""
    closed = [f"{gate}: {gate.advice}" for gate in gates if not gate.holds]
    if closed:
        raise ValueError("\n".join([*closed, "--no-gates goes on, and the table says so"]))
