"""Every law of every loss on every kind of detector, on one device."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
from functools import partial
from typing import Callable
from unittest import mock

import torch
from detectron2.utils.events import EventStorage

from distill_d2.testing import (
    LAWS,
    Cell,
    as_on_a_gpu,
    families,
    no_synchronization,
    recipes,
    step,
)

from .report import FAIL, PASS, SKIPPED, Report, Result, run_check, use_exact_float32

Name = tuple[str, str]  # of a recipe and a kind of detector
# Bit for bit on a CPU; on a GPU sums are taken in any order.
EXACT_LAWS = ("off_equals_the_baseline",)


def cell_names() -> list[Name]:
    """All cells; first every loss on the kind of detector that comes first."""
    known = recipes().items()
    return [
        (name, family) for family in families() for name, r in known if family in (r.only or [family])
    ]


def check_cells(report: Report, names: list[Name], device: str, workers: int = 4) -> None:
    """Check the cells in several processes, as long as there is time."""
    if workers < 2:
        for name in names:
            for result in _within(report, name, lambda name=name: check_cell(name, device)):
                report.results.append(result)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, initializer=logging.disable, initargs=(logging.WARNING,)) as pool:
        pending = {name: pool.apply_async(check_cell, (name, device)) for name in names}
        for name, task in pending.items():
            limit = max(report.time_left, 0.01)
            report.results += _within(report, name, lambda task=task, t=limit: task.get(timeout=t))
        pool.terminate()


def _within(report: Report, name: Name, results: Callable[[], list[Result]]) -> list[Result]:
    """The results of a cell; one that says "skipped" where there is no time left."""
    where = ", ".join(name)
    if report.time_left <= 0:
        return [Result("cells", where, SKIPPED, message="no time left")]
    try:
        return results()
    except multiprocessing.TimeoutError:
        return [Result("cells", where, SKIPPED, message="no time left")]
    except Exception as error:  # the process itself failed
        return [Result("cells", where, FAIL, message=f"{type(error).__name__}: {error}")]


def check_cell(name: Name, device: str) -> list[Result]:
    """All checks of one cell; one result, "pass", where the Distiller refuses the two."""
    where = ", ".join(name)
    torch.set_num_threads(1)
    use_exact_float32()
    if device != "cpu" and not _context_works():
        return [Result("cells", where, SKIPPED, message="an earlier error broke this process's GPU")]
    cells: list[Cell] = []

    def build() -> None:
        recipe, family = name
        cells.append(Cell.of_recipe(recipes()[recipe], families()[family], device))

    built = run_check("cells", where, build)
    if built.status == FAIL:
        return [built]
    if cells[0].refusal:
        return [Result("refused cells", where, PASS)]
    results = [built]
    for check, function in checks(device).items():
        results.append(run_check(check, where, partial(function, cells[0])))
    return results


def checks(device: str) -> dict[str, Callable[[Cell], None]]:
    """By name: the laws, and what is checked besides."""
    exact = EXACT_LAWS if device != "cpu" else ()
    laws = {law.__name__: law for law in LAWS if law.__name__ not in exact}
    if exact:
        laws["off_is_close_to_the_baseline"] = off_is_close_to_the_baseline
    laws["step_does_not_wait"] = step_does_not_wait
    laws["finite_in_bfloat16"] = partial(is_finite_in, dtype=torch.bfloat16)
    if device != "cpu":
        laws["finite_in_float16"] = partial(is_finite_in, dtype=torch.float16)
    return laws


def off_is_close_to_the_baseline(cell: Cell) -> None:
    """While the loss is off, the student's losses are those of the student alone."""
    _, alone = cell.alone
    model = cell.distiller()
    (loss,) = model.losses.values()
    with mock.patch.object(loss, "factor", lambda _iteration: 0.0):
        losses = step(model, cell.family.batch())
    shared = {name: losses[name] for name in alone}
    torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-6)


def step_does_not_wait(cell: Cell) -> None:
    """The teacher's pass, the loss and the backward pass of its terms do not make the host wait for the
    device. The student's own losses, which are detectron2's, do."""
    model, batch, own = cell.distiller(), cell.family.batch(), cell.alone[1]
    (loss,) = model.losses.values()
    step(model, batch)  # what is prepared once may wait
    with contextlib.ExitStack() as stack:
        for owner, name in ((model.teacher, "observe"), (loss, "forward")):
            method = guarded(getattr(owner, name), cell)
            stack.enter_context(mock.patch.object(owner, name, method))
        stack.enter_context(EventStorage(0))
        losses = model(batch)
    guarded(sum(value for name, value in losses.items() if name not in own).backward, cell)()


def guarded(function: Callable, cell: Cell) -> Callable:
    """The function, which fails if it waits for the device; on a CPU, if it would wait for a GPU."""

    def run(*args, **kwargs):
        with contextlib.ExitStack() as stack:
            if cell.device == "cpu":
                stack.enter_context(as_on_a_gpu())
            stack.enter_context(no_synchronization(host=cell.host))
            return function(*args, **kwargs)

    return run


def is_finite_in(cell: Cell, dtype: torch.dtype) -> None:
    """Under autocast to ``dtype`` losses and gradients are finite."""
    model = cell.distiller()
    with torch.autocast(cell.device, dtype=dtype):
        losses = step(model, cell.family.batch())
    broken = {name: loss.item() for name, loss in losses.items() if not loss.isfinite()}
    broken.update(
        (name, "gradient")
        for name, p in model.named_parameters()
        if p.grad is not None and not p.grad.isfinite().all()
    )
    if broken:
        raise AssertionError(f"not finite: {broken}")


def _context_works() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
