"""How much better kinds of runs are than the first of them, and how sure that is."""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .kinds import Kind
from .runs import Run
from .statistics import UNKNOWN, Interval, holm, paired_interval, welch_interval
from .tables import tables_of

_SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Gain:
    """A kind of runs beside the baseline.

    Attributes:
        seeds: that both have and that are compared; those of the kind alone where it is not ``paired``.
        values: of the metric, by seed.
        gains: value minus that of the same seed of the baseline; [] where it is not ``paired``.
        gain: of the means.
        over_seeds: Student's interval of ``gains``, or Welch's of two independent groups of runs.
        over_images: by the bootstrap, of the mean over these seeds.
        p_over_seeds, p_over_images: corrected by Holm for the number of kinds.
    """

    name: str
    paired: bool
    seeds: list[str]
    values: list[float]
    gains: list[float]
    gain: float
    over_seeds: Interval
    over_images: Interval = UNKNOWN
    p_over_seeds: float = math.nan
    p_over_images: float = math.nan

    @property
    def proven(self) -> str:
        """ "better" or "worse" if both intervals, with Holm's correction, exclude 0 on the same side; "no" if not;
        "" where one of them is not known."""
        p_values = self.p_over_seeds, self.p_over_images
        if any(map(math.isnan, p_values)):
            return ""
        if max(p_values) < _SIGNIFICANT:
            intervals = self.over_seeds, self.over_images
            if all(interval.low > 0 for interval in intervals):
                return "better"
            if all(interval.high < 0 for interval in intervals):
                return "worse"
        return "no"


@dataclass(frozen=True)
class Gains:
    """All kinds beside the baseline.

    Attributes:
        task, metric: "bbox" and "AP".
        seeds, values: of the baseline.
        draws: of test images; 0: there is no interval over them.
        notes: sentences on what a reader must know.
    """

    task: str
    metric: str
    baseline: str
    seeds: list[str]
    values: list[float]
    draws: int
    rows: list[Gain]
    notes: list[str] = field(default_factory=list)


def gains_of(
    kinds: Sequence[Kind], metric: str = "", *, draws: int = 0, seed: int = 0, truth: str = ""
) -> Gains:
    """Compare kinds of runs with the first of them.

    Runs of one seed are compared with each other: the seed is SEED of the run's config, else the number at the
    end of its folder's name. Kinds without two common seeds are compared as independent groups.

    Args:
        metric: "bbox/AP50", or "AP50" for the first task; "": that task's AP.
        draws: of test images, for the interval over them; 0: there is none.
        seed: of the draws.
        truth: see ``resampled``.

    Raises:
        ValueError, OSError: there is one kind alone; a run lacks the metric; see also ``resampled``.
    """
    if len(kinds) < 2:
        raise ValueError(
            f"all runs are of one kind, '{kinds[0].name}'; expected a baseline, too, in a folder or "
            "argument of its own"
        )
    task, name = _metric(kinds, metric)
    notes = [*_uneven(kinds), *_too_few(draws, len(kinds) - 1)]
    by_seed = [_by_seed(kind, notes) for kind in kinds]
    values = {run.path: _value(run, task, name) for kind in kinds for run in kind.runs}
    base, *others = by_seed
    pairs = [_compared(base, other) for other in others]
    rows = [
        _gain(kinds[0].name, kind.name, base, runs, pair, values, notes)
        for kind, runs, pair in zip(kinds[1:], others, pairs)
    ]
    if draws:
        rows = _with_images(rows, pairs, base, task, name, draws, seed, truth)
    p_seeds = holm([row.over_seeds.p for row in rows])
    p_images = holm([row.over_images.p for row in rows])
    rows = [
        dataclasses.replace(row, p_over_seeds=one, p_over_images=other)
        for row, one, other in zip(rows, p_seeds, p_images)
    ]
    base_values = [values[run.path] for run in base.values()]
    return Gains(task, name, kinds[0].name, list(base), base_values, draws, rows, notes)


def _metric(kinds: Sequence[Kind], metric: str) -> tuple[str, str]:
    """Task and name of a metric."""
    tasks = list(dict.fromkeys(table.task for table in tables_of(kinds)))
    for task in sorted(tasks, key=len, reverse=True):
        if metric.startswith(f"{task}/"):
            return task, metric[len(task) + 1 :]
    if "/" in metric and "-" not in metric.partition("/")[0]:
        raise ValueError(f"--metric {metric}: the runs have no such task in common; they have {tasks}")
    return tasks[0], metric or "AP"


def _value(run: Run, task: str, name: str) -> float:
    known = run.last.results.get(task, {})
    value = known.get(name, math.nan)
    if not math.isfinite(value):
        found = f"has the value {value}" if name in known else f"is not among {', '.join(known)}"
        raise ValueError(f"'{run.path}': {task}/{name} {found}; choose another metric (--metric)")
    return value


def _uneven(kinds: Sequence[Kind]) -> list[str]:
    """Kinds of which some runs have not come as far as others."""
    lengths = {kind.name: {run.name: run.last.iterations for run in kind.runs} for kind in kinds}
    return [
        f"{name}: its last evaluations are not after the same iterations: "
        + ", ".join(f"{run} {number}" for run, number in found.items())
        for name, found in lengths.items()
        if len(set(found.values())) > 1
    ]


def _too_few(draws: int, comparisons: int) -> list[str]:
    if not draws or 2 * comparisons / (draws + 1) < _SIGNIFICANT:
        return []
    needed = math.ceil(2 * comparisons / _SIGNIFICANT)
    return [
        f"{draws} draws of the test images are too few to prove anything in {comparisons} comparisons: "
        f"--bootstrap {needed} at least, better ten times as many."
    ]


def _by_seed(kind: Kind, notes: list[str]) -> dict[str, Run]:
    """A kind's runs by their seed."""
    configured = [_configured_seed(run) for run in kind.runs]
    numbers = [re.search(r"\d*$", run.name).group() or run.name for run in kind.runs]  # type: ignore[union-attr]
    twice = [seed for seed in configured if seed and configured.count(seed) > 1]
    if twice:
        notes.append(
            f"{kind.name}: several runs have SEED {twice[0]}; intervals of copies of one run are too narrow."
        )
    mixed = [seed or number for seed, number in zip(configured, numbers)]
    paths = [run.path for run in kind.runs]
    names = next(each for each in (mixed, numbers, paths) if len(set(each)) == len(each))
    return dict(zip(names, kind.runs))


def _configured_seed(run: Run) -> str:
    """SEED of a run's config; "" where it is not known, or random."""
    seed = run.settings.get("SEED", run.settings.get("train.seed"))
    return str(seed) if isinstance(seed, int) and seed >= 0 else ""


@dataclass(frozen=True)
class _Pair:
    """The runs of a kind, and those of the baseline that they are compared with."""

    paired: bool
    runs: dict[str, Run]
    base: dict[str, Run]


def _compared(base: dict[str, Run], runs: dict[str, Run]) -> _Pair:
    common = [seed for seed in base if seed in runs]
    if len(common) >= 2 or (common and min(len(base), len(runs)) == 1):
        return _Pair(True, {seed: runs[seed] for seed in common}, {seed: base[seed] for seed in common})
    return _Pair(False, runs, base)


def _gain(
    base_name: str,
    name: str,
    base: dict[str, Run],
    runs: dict[str, Run],
    pair: _Pair,
    values: dict[str, float],
    notes: list[str],
) -> Gain:
    mine, theirs = ([values[run.path] for run in part.values()] for part in (pair.runs, pair.base))
    gains = [one - other for one, other in zip(mine, theirs)] if pair.paired else []
    over_seeds = paired_interval(gains) if pair.paired else welch_interval(mine, theirs)
    gain = statistics.fmean(mine) - statistics.fmean(theirs)
    if not pair.paired:
        notes.append(
            f"{name}: its seeds ({', '.join(pair.runs)}) are not those of {base_name} ({', '.join(base)}); they "
            "are compared as independent runs (Welch), not seed by seed."
        )
    elif left_out := [seed for seed in dict.fromkeys([*base, *runs]) if seed not in pair.base]:
        notes.append(
            f"{name}: it is compared with {base_name} on common seeds alone, without {', '.join(left_out)}."
        )
    if math.isnan(over_seeds.p):
        notes.append(f"{name}: an interval over seeds needs at least two runs of both.")
    return Gain(name, pair.paired, list(pair.runs), mine, gains, gain, over_seeds)


def _with_images(
    rows: Sequence[Gain],
    pairs: Sequence[_Pair],
    base: dict[str, Run],
    task: str,
    name: str,
    draws: int,
    seed: int,
    truth: str,
) -> list[Gain]:
    """With the intervals over test images."""
    from .bootstrap import bootstrap_gain  # pycocotools is not needed otherwise
    from .detections import resampled

    runs = {run.path: run for part in (base, *(pair.runs for pair in pairs)) for run in part.values()}
    drawn = resampled(list(runs.values()), task, name, draws=draws, seed=seed, truth=truth)
    by_path: dict[str, np.ndarray] = dict(zip(runs, drawn))
    return [
        dataclasses.replace(
            row,
            over_images=bootstrap_gain(
                [by_path[run.path] for run in pair.runs.values()],
                [by_path[run.path] for run in pair.base.values()],
            ),
        )
        for row, pair in zip(rows, pairs)
    ]
