"""Print what is found out about a run."""

from __future__ import annotations

import argparse
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..balance import gradient_table, unbalanced
from ..data import end_workers
from ..data.summary import summarize, summary_table
from ..distiller import Distiller
from ..duration import evaluations_of, expected_duration, spoken
from ..engine import DistillTrainer, RunSettings
from ..engine.output_dir import check_writable
from ..messages import shortened
from .faults import Faults, noted
from .pictures import draw_batch
from .run import build_trainer, check_data, read
from .steps import (
    StepCost,
    evaluation_seconds,
    first_batch,
    measure_gradients,
    measure_steps,
)
from .weights import balanced_weights, write_weights

_GIGABYTE = 2**30
_NOTE = 400  # characters


def check_run(args: argparse.Namespace) -> int:
    """Check all of a run, print what was found, and return the exit status: 1 if something is wrong.

    Args:
        args: of the command, and those of a training.
    """
    if args.pictures:
        check_writable(args.pictures, "--pictures")
    faults = Faults()
    notes: list[str] = []
    with noted(notes):
        cfg = read(args, faults)
    if cfg is not None:
        _check_config(args, cfg, faults, notes)
    _print_list("To know:", [shortened(note, _NOTE) for note in notes])
    _print_list("Wrong:", faults.messages)
    if not faults:
        print("Nothing is wrong.")
    return 1 if faults else 0


def _check_config(args: argparse.Namespace, cfg: Any, faults: Faults, notes: list[str]) -> None:
    with noted(notes):
        check_data(cfg, faults)
        data = _data_table(RunSettings.from_config(cfg), faults)
    if data:
        print(f"{data}\n")
    with noted(notes):
        trainer = build_trainer(cfg, faults)
    if trainer is not None:
        print(f"{_models(trainer)}\n")
        _measure(args, trainer, faults, notes)


def _measure(
    args: argparse.Namespace, trainer: DistillTrainer, faults: Faults, notes: list[str]
) -> None:
    with noted(notes), faults.collected():
        try:
            pictures = _draw(args.pictures, trainer, first_batch(trainer)) if args.pictures else []
            gradients = measure_gradients(trainer, args.batches)
            evaluation, cost = evaluation_seconds(trainer), measure_steps(trainer)
        finally:
            end_workers()
    if faults:
        return
    if pictures:
        print(f"The first batch, as trained on: {len(pictures)} pictures in {args.pictures}\n")
    print(f"{gradient_table(gradients)}\n\n{_cost(trainer.settings, cost, evaluation)}\n")
    model = trainer.plain_model
    if isinstance(model, Distiller):
        notes += unbalanced(gradients, model.losses)
        _tell_weights(args, balanced_weights(model.losses, gradients, args.ratio))


def _draw(folder: str, trainer: DistillTrainer, batch: list[dict[str, Any]]) -> list[str]:
    model, datasets = trainer.plain_model, trainer.settings.train_datasets
    student = model.student if isinstance(model, Distiller) else model
    classes = MetadataCatalog.get(datasets[0]).get("thing_classes", []) if datasets else []
    return draw_batch(batch, folder, trainer.settings.channel_order(student), classes)


def _print_list(title: str, lines: list[str]) -> None:
    if lines:
        print("\n".join((title, *(f"- {line}" for line in lines), "")))


def _data_table(settings: RunSettings, faults: Faults) -> str:
    """A table of the datasets that can be read."""
    uses: dict[str, list[str]] = {}
    for use, names in (("train", settings.train_datasets), ("test", settings.test_datasets)):
        for name in names:
            uses.setdefault(name, []).append(use)
    rows = []
    for name, of_name in uses.items():
        with faults.collected():
            if name in DatasetCatalog.list():
                rows.append((summarize(name, DatasetCatalog.get(name)), ", ".join(of_name)))
    return f"Data:\n{summary_table(rows)}" if rows else ""


def _models(trainer: DistillTrainer) -> str:
    """The student, the teacher, and the levels that are compared."""
    model = trainer.plain_model
    student: Any = model.student if isinstance(model, Distiller) else model
    count = sum(parameter.numel() for parameter in student.parameters()) / 1e6
    weights = trainer.settings.weights or "random weights"
    lines = [
        f"Student: {type(student).__name__}, {count:.2f} M parameters, {weights}, on {trainer.settings.device}"
    ]
    if isinstance(model, Distiller):
        lines += [f"Teacher: {model.teacher.describe()}", "", model.describe_levels()]
    return "\n".join(lines).rstrip()


def _cost(settings: RunSettings, cost: StepCost, evaluation: float) -> str:
    """Time and memory of a step, and the duration of the run."""
    rest = cost.seconds - sum(cost.parts.values())
    parts = {**cost.parts, "backward and update": max(rest, 0.0)}
    times = ", ".join(f"{name} {seconds:.3g}" for name, seconds in parts.items())
    steps = settings.max_iter + settings.distiller.PRETRAIN_TEACHER_ITERS
    count = evaluations_of(settings.max_iter, settings.eval_period) if evaluation else 0
    duration = expected_duration(steps, cost.seconds, count, evaluation)
    tests = f", and {count} x {spoken(evaluation)} of evaluation" if count else ", without evaluation"
    return (
        f"A step takes {cost.seconds:.3g} s ({times}); peak memory {cost.memory / _GIGABYTE:.2g} GB\n"
        f"Expected duration: {spoken(duration)}, of {steps} steps{tests}"
    )


def _tell_weights(args: argparse.Namespace, weights: dict[str, float]) -> None:
    if not weights:
        return
    pairs = " ".join(f"{key} {weight:g}" for key, weight in weights.items())
    print(
        f"With these weights each loss pulls on the student {args.ratio:g} times as strongly as the task:"
    )
    print(f"    {pairs}\n")
    if args.write:
        write_weights(args.write, args.config_file, args.opts, weights)
        print(f"Written with these weights: {args.write}\n")
