"""The proof from its first run to its table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..duration import spoken
from . import gates
from .costs import Costs
from .jobs import Job, mean_ap
from .plan import Plan
from .rows import Pair, Row
from .settings import Settings
from .table import Results, results_of, write_tables

#: Runs jobs, so many at a time, and tells news of those that run.
RunJobs = Callable[[Sequence[Job], int, Callable[[Sequence[Job]], None]], None]


class Proof:
    """The stages of a proof; each goes on where an earlier one was stopped, and repeats nothing that is finished.

    Attributes:
        gates: of all pairs, once they are known.
    """

    def __init__(self, settings: Settings, processes: int, run_jobs: RunJobs):
        self.settings = settings
        self.processes = processes
        self.gates: list[gates.Gate] = []
        self._run_jobs = run_jobs
        self._plan = Plan(settings)
        self._pairs = settings.pairs

    def run(self, *, stop_at_gates: bool = True, with_test: bool = True) -> None:
        """Train everything, then read the test set, once, and write the table.

        Args:
            stop_at_gates: end where a gate does not hold.
            with_test: False: stop before the test set is read.

        Raises:
            ValueError: a gate does not hold; a folder holds a run of other settings.
            SystemExit: a run failed.
        """
        self.tell()
        self._finish("teachers and students alone", self._first())
        self.gates = [gate for pair in self._pairs for gate in self._gates_of(pair)]
        print("\n".join(map(str, self.gates)), flush=True)
        if stop_at_gates:
            gates.check(self.gates)
        self._finish("distilled students", self._distilled())
        self._finish("students for the same time, and more seeds of the best", self._last())
        for pair in self._pairs:
            print(_on_val(pair, self._trained(pair)), flush=True)
        if not with_test:
            return
        tests = [self._plan.test(job) for pair in self._pairs for job in self._trained(pair)]
        self._finish(f"evaluations on {self.settings.photos.test}", tests)
        print(write_tables(self.settings, [self._results(pair) for pair in self._pairs], self.gates))

    def tell(self) -> None:
        """Print how many runs are left, and their hours."""
        jobs = self._foreseen()
        costs = Costs(jobs)
        for pair in self._pairs:
            for row in pair.rows:
                told = [job for job in jobs if (job.pair.name, job.row) == (pair.name, row)]
                if told:
                    print(_told(told, costs))
        left = [job for job in jobs if not job.finished()]
        time = spoken(costs.wall_time(left, self.processes))
        print(
            f"{len(left)} of {len(jobs)} trainings left: about {time} with {self.processes} "
            f"process{'es' * (self.processes > 1)}, and an evaluation of each on the test set",
            flush=True,
        )

    def _first(self) -> list[Job]:
        """The longest first, so that none is left alone at the end."""
        plan, pairs = self._plan, self._pairs
        jobs = [plan.teacher(pair) for pair in pairs]
        jobs += [job for pair in pairs for job in plan.doubled(pair)]
        return jobs + [job for pair in pairs for job in plan.alone(pair)]

    def _distilled(self) -> list[Job]:
        return [job for pair in self._pairs for job in self._plan.methods(pair)]

    def _last(self) -> list[Job]:
        return [job for pair in self._pairs for job in (*self._same_time(pair), *self._more_seeds(pair))]

    def _foreseen(self) -> list[Job]:
        """All trainings; those that depend on results not there yet as they are expected."""
        return _distinct([*self._first(), *self._distilled(), *self._last()])

    def _same_time(self, pair: Pair) -> list[Job]:
        if not (pair.timed and pair.methods):
            return []
        costs = Costs([*self._plan.alone(pair), *self._plan.methods(pair)])
        return self._plan.same_time(pair, costs.slowest_ratio(pair, pair.methods))

    def _more_seeds(self, pair: Pair) -> list[Job]:
        return self._plan.more_seeds(pair, self._best(pair))

    def _best(self, pair: Pair) -> list[Row]:
        """The best methods by val; before all are finished the first ones."""
        jobs = self._plan.methods(pair)
        if not all(job.finished() for job in jobs):
            return list(pair.methods[: pair.best])
        scores = {row: mean_ap([job for job in jobs if job.row == row]) for row in pair.methods}
        return sorted(pair.methods, key=lambda row: -scores[row])[: pair.best]

    def _gates_of(self, pair: Pair) -> list[gates.Gate]:
        plan = self._plan
        return gates.gates_of(pair, plan.teacher(pair), plan.alone(pair), plan.doubled(pair))

    def _trained(self, pair: Pair) -> list[Job]:
        """All trainings of a pair."""
        plan = self._plan
        first = [plan.teacher(pair), *plan.alone(pair), *plan.doubled(pair)]
        return [*first, *plan.methods(pair), *self._same_time(pair), *self._more_seeds(pair)]

    def _results(self, pair: Pair) -> Results:
        trained = self._trained(pair)
        return results_of(pair, trained, [self._plan.test(job) for job in trained], self.settings)

    def _finish(self, stage: str, jobs: Sequence[Job]) -> None:
        """Run those jobs of a stage that are not finished.

        Raises:
            SystemExit: a run ended without its results.
        """
        jobs = _distinct(jobs)
        left = [job for job in jobs if not job.finished()]
        print(f"{stage}: {len(left)} of {len(jobs)} runs are left", flush=True)
        if not left:
            return
        self._run_jobs(left, self.processes, self._news)
        for job in left:
            if not job.finished():
                raise SystemExit(f"{job.name} has ended without its results; see {job.folder}")

    def _news(self, running: Sequence[Job]) -> None:
        jobs = self._foreseen()
        costs = Costs(jobs)
        left = [job for job in jobs if not job.finished()]
        told = [
            f"{job.name}: {job.iteration()} of {job.iterations}" for job in running if job.iterations
        ]
        time = spoken(costs.wall_time(left, self.processes))
        words = [*told, f"{len(left)} of {len(jobs)} trainings are left, about {time}"]
        print(f"  {'; '.join(words)}", flush=True)


def _distinct(jobs: Sequence[Job]) -> list[Job]:
    """Pairs may share a teacher."""
    return list({job.name: job for job in jobs}.values())


def _told(jobs: Sequence[Job], costs: Costs) -> str:
    job, hours = jobs[0], sum(map(costs.left, jobs)) / 3600
    seeds = ", ".join(str(seed) for seed in sorted({job.seed for job in jobs}))
    seconds = costs.per_iteration(job.pair, job.row)
    return (
        f"{job.pair.name:10} {job.row.title:34} seeds {seeds}: {job.iterations} iterations of {seconds:.3f} s, "
        f"{hours:.2f} h left"
    )


def _on_val(pair: Pair, jobs: Sequence[Job]) -> str:
    found: list[Any] = []
    for row in pair.rows:
        values = [job.ap() for job in jobs if job.row == row]
        if values:
            found.append(
                f"  {row.title:34} {sum(values) / len(values):6.2f}  ({', '.join(f'{v:.2f}' for v in values)})"
            )
    return "\n".join([f"{pair.name}: AP on val, mean of seeds", *found])
