"""How long runs take: by what was measured here, else by the table of ``rows``."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from .jobs import Job
from .rows import Pair, Row

# Of imports, reading the data, and the evaluation of 500 images.
SECONDS_PER_RUN = 40.0


class Costs:
    """Seconds of jobs, by those that have begun."""

    def __init__(self, jobs: Iterable[Job]):
        found: dict[tuple[str, str], list[float]] = {}
        for job in jobs:
            seconds = job.seconds_per_iteration() if job.iterations else None
            if seconds is not None:
                found.setdefault((job.pair.name, job.row.name), []).append(seconds)
        self._measured = {key: statistics.median(values) for key, values in found.items()}
        rows = [(pair.name, row) for pair in {job.pair for job in jobs} for row in pair.rows]
        known = [(self._measured.get((pair, row.name)), row.seconds) for pair, row in rows]
        ratios = [seconds / expected for seconds, expected in known if seconds is not None]
        #: This machine beside that of the table.
        self.slower = statistics.median(ratios) if ratios else 1.0

    def per_iteration(self, pair: Pair, row: Row) -> float:
        """Seconds of an iteration."""
        expected = row.seconds * self.slower
        return self._measured.get((pair.name, row.name), expected)

    def left(self, job: Job) -> float:
        """Seconds until a job is finished, alone on a core."""
        if job.finished():
            return 0.0
        iterations = max(job.iterations - job.iteration(), 0)
        return SECONDS_PER_RUN + iterations * self.per_iteration(job.pair, job.row)

    def wall_time(self, jobs: Sequence[Job], processes: int) -> float:
        """Seconds until all are finished, side by side."""
        seconds = [self.left(job) for job in jobs]
        return max([sum(seconds) / processes, *seconds]) if seconds else 0.0

    def slowest_ratio(self, pair: Pair, rows: Iterable[Row]) -> float:
        """How many times as long as the student's alone an iteration of the slowest row is; at least 1."""
        alone = self.per_iteration(pair, pair.alone)
        return max([1.0, *(self.per_iteration(pair, row) / alone for row in rows)])
