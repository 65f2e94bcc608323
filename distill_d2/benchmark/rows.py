"""What a round measures, by the name of its row."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any, Callable

import torch

from distill_d2 import DistillLoss, Teacher
from distill_d2.teacher.cache import MemoryStore
from distill_d2.testing.replay import Records, Replay, record

from .naive import NAIVE, SLOW_NAIVE, NaiveFormula
from .parts import PARTS, Compute
from .subjects import DISTILLED, STUDENT, Subjects, own_optimizer

PART, PREPARED, WHOLE = "teacher part, plain", "teacher part, prepared", "teacher whole, plain"
CACHED = f"{DISTILLED}, teacher cached"
# A loss takes milliseconds, a step seconds: each round repeats the losses this often.
LOSS_REPEATS = 5
NAIVE_ROW = "{}, naive formula"

Tasks = dict[str, Callable[[], None]]


def build_tasks(subjects: Subjects, against_naive: bool = False) -> Tasks:
    """What a round runs, by row name; neighbors in time are those that the headline compares."""
    distiller, plain = subjects.distiller, subjects.plain
    records = record(distiller, subjects.steps[DISTILLED].run_step)
    part = partial(run_part, inputs=subjects.inputs, records=records)
    tasks: Tasks = {
        STUDENT: subjects.steps[STUDENT].run_step,
        PART: in_precision(lambda: part(plain), subjects),
        DISTILLED: subjects.steps[DISTILLED].run_step,
        CACHED: cached_step(subjects),
        PREPARED: in_precision(lambda: part(distiller.teacher), subjects),
        WHOLE: in_precision(lambda: run_whole(plain, subjects.inputs), subjects),
    }
    formulas = {**NAIVE, **(SLOW_NAIVE if against_naive else {})}
    for name, loss in distiller.losses.items():
        tasks.update(loss_tasks(name, loss, formulas.get(name), Replay(distiller, records)))
    return tasks


def cached_step(subjects: Subjects) -> Callable[[], None]:
    """A distilled step that takes the teacher's outputs from memory, as with TEACHER_CACHE "memory".

    Raises:
        ValueError: an output cannot be kept; the message names the module.
    """
    teacher, step = subjects.distiller.teacher, subjects.steps[DISTILLED]
    teacher.keep_outputs(MemoryStore(sys.maxsize))
    cache, teacher.cache = teacher.cache, None

    def run() -> None:
        teacher.cache = cache
        try:
            step.run_step()
        finally:
            teacher.cache = None

    return run


def in_precision(run: Callable[[], None], subjects: Subjects) -> Callable[[], None]:
    """``run`` as it runs in a step: with mixed precision on a GPU under autocast; on a CPU teachers
    compute in float32."""
    step, device = subjects.steps[DISTILLED], subjects.distiller.device
    if step.autocast_dtype is None or device.type != "cuda":
        return run

    def under_autocast() -> None:
        with torch.autocast(device.type, dtype=step.autocast_dtype):
            run()

    return under_autocast


def loss_tasks(name: str, loss: DistillLoss, formula: NaiveFormula | None, replay: Replay) -> Tasks:
    """The rows of one loss; ``formula`` of NAIVE or SLOW_NAIVE."""
    parameters, alone = list(loss.parameters()), f"{name} alone"
    task = LossTask(replay, loss, parameters, own_optimizer(loss, parameters))
    tasks: Tasks = {alone: task}
    if formula is not None:
        compute, trained = formula(loss)
        task.against = NAIVE_ROW.format(alone)
        tasks[task.against] = LossTask(replay, compute, trained, own_optimizer(loss, trained))
    if name not in PARTS:
        return tasks
    row = f"{name} part: {{}}".format
    for part, (compute, against) in replay(partial(PARTS[name], loss)).items():
        tasks[row(part)] = LossTask(replay, compute, parameters, against=against and row(against))
    return tasks


def compared_rows(tasks: Tasks) -> list[tuple[str, str]]:
    """Pairs of rows whose ratios are printed."""
    against = {name: getattr(task, "against", "") for name, task in tasks.items()}
    return [pair for pair in against.items() if pair[1]]


def run_part(teacher: Teacher, inputs: list[dict[str, Any]], records: Records) -> None:
    """What the losses ask of a teacher: backbone and neck, and its heads where they use these."""
    images = [item["image"].to(teacher.device, non_blocking=True) for item in inputs]
    view = teacher.view
    with view.recording():
        teacher.observe(images, records.batch.padded_size)
        if "dense" in view.required:
            view.dense()
        if "rpn" in view.required:
            view.rpn()
        if records.proposals is not None:
            view.box_head(records.proposals)
        if records.own_proposals is not None:
            view.own_proposals(records.batch)
            view.box_head(records.own_proposals[0])
        if "score_boxes" in view.required:
            view.score_boxes([item["instances"].gt_boxes.to(teacher.device) for item in inputs])


@torch.no_grad()
def run_whole(teacher: Teacher, inputs: list[dict[str, Any]]) -> None:
    teacher.model(inputs)


class LossTask:
    """Forward and backward of a loss, or of another formula, on recorded outputs, and the update of its
    parameters where it has an optimizer of its own; LOSS_REPEATS times.

    Attributes:
        against: the name of another row; the ratios of this row's time and memory to it are printed.
    """

    repeats = LOSS_REPEATS

    def __init__(
        self,
        replay: Replay,
        compute: Compute,
        parameters: list[torch.Tensor],
        optimizer: torch.optim.Optimizer | None = None,
        against: str = "",
    ):
        self.replay = replay
        self.compute = compute
        self.leaves = [*replay.records.leaves, *parameters]
        self.optimizer = optimizer
        self.against = against

    def __call__(self) -> None:
        for _ in range(self.repeats):
            # An existing gradient would be added to, which is not the loss's own work.
            self.release()
            terms = self.replay(self.compute)
            if terms:  # a part without gradients returns none
                sum(terms.values()).backward()
            if self.optimizer is not None:
                self.optimizer.step()
        self.release()

    def release(self) -> None:
        """Drop all gradients: they are part of the memory of the task that makes them."""
        for leaf in self.leaves:
            leaf.grad = None
