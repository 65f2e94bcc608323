"""Which runs there are, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import model_zoo
from ..config_files import read_config
from ..report.runs import flat
from .jobs import FINAL, Job, noted_length
from .rows import PAIRS, Pair, Row
from .settings import Settings

_CACHE = "MODEL.DISTILLER.TEACHER_CACHE"
# Keys that change nothing of what is learned.
_NOT_COMPARED = (
    "DATASETS.CUSTOM",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.EVAL_PERIOD",
    _CACHE,
    f"{_CACHE}_GB",
)


class Plan:
    """Makes the jobs of a proof. Nothing is run, and nothing but configs is read."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self._options = dict(zip(settings.options[::2], settings.options[1::2]))
        self._digests = settings.photos.digests()
        self._known: dict[str, dict[str, Any]] = {}

    def teacher(self, pair: Pair) -> Job:
        return self._training(self._teachers(pair), pair.teacher, self.settings.seeds[0])

    def alone(self, pair: Pair) -> list[Job]:
        """The student alone, a job per seed."""
        return [self._training(pair, pair.alone, seed) for seed in self.settings.seeds]

    def doubled(self, pair: Pair) -> list[Job]:
        """The same, with twice the iterations, for the first seed."""
        length = 2 * self.iterations(pair, pair.alone)
        return [self._training(pair, pair.doubled, seed, length) for seed in self.settings.seeds[:1]]

    def same_time(self, pair: Pair, ratio: float) -> list[Job]:
        """The same, as long as a training of ``ratio`` times its seconds per iteration; runs that have begun keep
        the length that they have."""
        seeds = self.settings.seeds
        row = pair.same_time
        begun = [noted_length(self._folder("train", pair, row, seed)) for seed in seeds]
        length = next(filter(None, begun), round(ratio * self.iterations(pair, pair.alone)))
        return [self._training(pair, pair.same_time, seed, length) for seed in seeds]

    def methods(self, pair: Pair, seeds: Sequence[int] | None = None) -> list[Job]:
        """The distillations, seed by seed."""
        seeds = self.settings.seeds if seeds is None else seeds
        return [self._training(pair, row, seed) for seed in seeds for row in pair.methods]

    def more_seeds(self, pair: Pair, best: Sequence[Row]) -> list[Job]:
        """Of the best methods and of the student alone, those that ``methods`` and ``alone`` have not."""
        seeds = [seed for seed in self.settings.best_seeds if seed not in self.settings.seeds]
        rows = (pair.alone, *best) if best else ()
        return [self._training(pair, row, seed) for seed in seeds for row in rows]

    def test(self, trained: Job) -> Job:
        """The evaluation of a finished training on the test set."""
        photos, weights = self.settings.photos, trained.folder / FINAL
        folder = self._folder(photos.test_name, trained.pair, trained.row, trained.seed)
        words = ["evaluate", "--num-gpus", str(self.settings.num_gpus)]
        words += ["--config-file", str(trained.folder / "config.yaml")]
        words += [*photos.test_options(), "MODEL.WEIGHTS", str(weights), "OUTPUT_DIR", str(folder)]
        return Job(trained.pair, trained.row, trained.seed, folder, tuple(words), weights=weights)

    def iterations(self, pair: Pair, row: Row) -> int:
        """The length of a row's training, by its config or the command line."""
        return int(self._values(pair.config(row))["SOLVER.MAX_ITER"])

    def _training(self, pair: Pair, row: Row, seed: int, length: int = 0) -> Job:
        length = length or self.iterations(pair, row)
        folder = self._folder("train", pair, row, seed)
        command = "train" if row in pair.methods else "baseline"
        words = [command, "--resume", "--num-gpus", str(self.settings.num_gpus)]
        words += ["--config-file", pair.config(row), *self.settings.photos.training_options()]
        values = {**self._values(pair.config(row)), "SOLVER.MAX_ITER": length, "SEED": seed}
        own = {"SOLVER.MAX_ITER": str(length), "SEED": str(seed), "OUTPUT_DIR": str(folder)}
        if row in pair.methods:
            teacher = self.teacher(pair)
            own["MODEL.DISTILLER.TEACHER_WEIGHTS"] = str(teacher.folder / FINAL)
            if pair.keeps_teacher and _CACHE not in self._options:
                own[_CACHE] = str(self.settings.output / "teacher_cache" / pair.name)
            config = teacher.pair.config(teacher.row)
            values.update((f"teacher {key}", v) for key, v in self._values(config).items())
        words += [word for item in {**self._options, **own}.items() for word in item]
        return Job(pair, row, seed, folder, tuple(words), length, {**values, **self._digests})

    @staticmethod
    def _teachers(pair: Pair) -> Pair:
        """The pair to which the teacher of ``pair`` belongs."""
        return PAIRS.get(pair.taught_by, pair)

    def _values(self, config: str) -> dict[str, Any]:
        """All keys that a config and the command line set."""
        if config in self._known:
            return self._known[config]
        values = dict(flat(read_config(model_zoo.find_config(config)).values))
        values.update(self._options)
        values = {key: v for key, v in values.items() if key not in _NOT_COMPARED}
        return self._known.setdefault(config, values)

    def _folder(self, part: str, pair: Pair, row: Row, seed: int) -> Path:
        return self.settings.output / part / pair.name / row.name / f"seed{seed}"
