"""The settings of a proof, from the command line."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from detectron2.config import get_cfg

from ..config import add_distill_config
from ..config_values import set_options
from ..data.custom_entries import datasets_root
from ..pairs import pairs_of
from .data import Photos
from .rows import PAIRS, Pair

_FOLDER = "voc_animals"


@dataclass(frozen=True)
class Settings:
    """Of the whole proof.

    Attributes:
        output: the folder of all runs.
        pairs: with the methods that are trained.
        seeds: of every row but the teacher, which has the first.
        best_seeds: of a pair's best methods, and of the student alone beside them.
        num_gpus: of each run.
        options: KEY VALUE words for all trainings.
    """

    photos: Photos
    output: Path
    pairs: tuple[Pair, ...]
    seeds: tuple[int, ...] = (1, 2, 3)
    best_seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    num_gpus: int = 0
    options: tuple[str, ...] = ()

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> Settings:
        """
        Args:
            args: of ``distill-d2 proof``.

        Raises:
            KeyError, ValueError, FileNotFoundError: an argument is wrong.
        """
        for option, value in (("--seeds", args.seeds), ("--best-seeds", args.best_seeds)):
            if value < 1:
                raise ValueError(f"{option} {value}: expected 1 or more")
        if args.processes is not None and args.processes < 1:
            raise ValueError(f"--processes {args.processes}: expected 1 or more")
        return cls(
            Photos.of(args.data or str(Path(datasets_root()) / _FOLDER), args.test, args.test_images),
            Path(args.output).expanduser().resolve(),
            _pairs(args.pairs, args.only),
            tuple(range(1, args.seeds + 1)),
            tuple(range(1, args.best_seeds + 1)),
            args.num_gpus,
            _options(args.opts),
        )


def _options(words: list[str]) -> tuple[str, ...]:
    """The KEY VALUE words. Raises KeyError or ValueError for a wrong one, before hours of other runs."""
    cfg = get_cfg()
    add_distill_config(cfg)
    set_options(cfg, words)
    return tuple(pairs_of(words))


def _pairs(names: list[str], only: list[str] | None) -> tuple[Pair, ...]:
    pairs = [PAIRS[name] for name in dict.fromkeys(names)]
    if only is None:
        return tuple(pairs)
    chosen = [
        replace(pair, methods=tuple(row for row in pair.methods if row.name in only)) for pair in pairs
    ]
    found = tuple(pair for pair in chosen if pair.methods)
    if not found:
        raise ValueError(f"--only {' '.join(only)}: no pair of {', '.join(names)} has such a row")
    return found
