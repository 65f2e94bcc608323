"""Run jobs side by side, one process each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from ..demo import Run, child_environment, stop
from .jobs import CONSOLE, Job

SECONDS_BETWEEN_NEWS = 60
_SECONDS_BETWEEN_LOOKS = 0.5


def physical_cores() -> int:
    """The cores that this process may use; threads of one core count once."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    files = [Path(f"/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list") for n in usable]
    return len({file.read_text() if file.is_file() else file.parts[5] for file in files})


def run_jobs(
    jobs: Sequence[Job],
    processes: int,
    news: Callable[[Sequence[Job]], None],
    start: Callable[[Job], Run] | None = None,
) -> None:
    """Run jobs in their order, so many at a time.

    Args:
        news: is given the running jobs from time to time.
        start: default: ``start_job``.

    Raises:
        SystemExit: a job failed, with its status; the others were stopped, and left a checkpoint.
    """
    start = start or start_job
    waiting, running = list(jobs), list[tuple[Job, Run]]()
    shown = time.time()
    with _terminated_as_interrupted():
        try:
            while waiting or running:
                while waiting and len(running) < processes:
                    job = waiting.pop(0)
                    running.append((job, start(job)))
                time.sleep(_SECONDS_BETWEEN_LOOKS)
                for _, run in running:
                    if run.process.poll():
                        stop(run)
                running = [(job, run) for job, run in running if run.process.poll() is None]
                if running and time.time() - shown > SECONDS_BETWEEN_NEWS:
                    shown = time.time()
                    news([job for job, _ in running])
        finally:
            _end([run.process for _, run in running])


def start_job(job: Job) -> Run:
    """Start a job; what it prints goes to the end of its CONSOLE."""
    job.prepare()
    print(f"$ {job.command}", flush=True)
    output = job.folder / CONSOLE
    with open(output, "a") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "distill_d2", *job.words],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=child_environment(),
        )
    return Run(process, output)


def _end(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        process.wait()


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Inside, SIGTERM ends this process as an exception does, so that its children are ended, too."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
