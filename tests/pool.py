"""Processes forked from one that has imported the package, which takes seconds: two over gloo that stay for the
whole session, and run what tests give them; and one for each script that a test runs."""

from __future__ import annotations

import atexit
import io
import multiprocessing
import os
import queue
import runpy
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import builtin
from detectron2.utils import comm

#: Imported once, in the process from which the others are forked.
PRELOAD = ["distill_d2.engine", "distill_d2.testing"]


class Pool:
    """Processes that start when they are first used. A failed job ends them; the next starts new ones."""

    def __init__(self, size: int = 2, timeout: float = 240.0):
        """
        Args:
            size: the number of processes.
            timeout: seconds that a job may take.
        """
        self.size = size
        self.timeout = timeout
        self._processes: list[Any] = []

    def run(self, function: Callable, *args: Any) -> list[Any]:
        """Call ``function(*args)``, which must be at the top of a module, in each process.

        Returns:
            what each of them returned, by rank.

        Raises:
            RuntimeError: one of them failed, or took too long.
        """
        if not self._processes:
            self._start()
        for inbox in self._inboxes:
            inbox.put((function, args))
        results: dict[int, Any] = {}
        while len(results) < self.size:
            try:
                rank, result, problem = self._outbox.get(timeout=self.timeout)
            except queue.Empty:
                self.close()
                raise RuntimeError(f"{function.__name__} took over {self.timeout} s") from None
            if problem:
                self.close()
                raise RuntimeError(f"process {rank}: {problem}")
            results[rank] = torch.load(io.BytesIO(result), weights_only=False)
        return [results[rank] for rank in range(self.size)]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []

    def _start(self) -> None:
        context = _context()
        self._outbox = context.Queue()
        self._inboxes = [context.Queue() for _ in range(self.size)]
        meeting = Path(tempfile.mkdtemp()) / "meeting"
        for rank, inbox in enumerate(self._inboxes):
            arguments = (rank, self.size, f"file://{meeting}", inbox, self._outbox)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self._processes.append(process)


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def start_script(words: Sequence[str], output: Path) -> Any:
    """Run a Python script with arguments in a process of its own, as the main program.

    Args:
        output: the file for what it writes.

    Returns:
        the process, see ``multiprocessing.Process``.
    """
    arguments = (list(words), os.getcwd(), dict(os.environ), str(output))
    process = _context().Process(target=_run_script, args=arguments)
    process.start()
    return process


def _run_script(words: list[str], folder: str, environment: dict[str, str], output: str) -> None:
    with open(output, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    _register_data()
    sys.argv, sys.path[0] = words, os.path.dirname(os.path.abspath(words[0]))
    torch.set_num_threads(1)
    try:
        runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def _register_data() -> None:
    """detectron2's own data sets, below today's $DETECTRON2_DATASETS: the fork server has registered those of its
    first test."""
    root = os.environ.get("DETECTRON2_DATASETS", "datasets")
    DatasetCatalog.clear()
    MetadataCatalog.clear()
    for register in (builtin.register_all_coco, builtin.register_all_pascal_voc):
        register(root)


def _serve(rank: int, size: int, address: str, inbox: Any, outbox: Any) -> None:
    torch.set_num_threads(1)
    torch._C._set_graph_executor_optimize(False)  # as in the tests' process
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    comm.create_local_process_group(size)
    while True:
        function, args = inbox.get()
        try:
            result = io.BytesIO()
            torch.save(function(*args), result)
        except BaseException:
            outbox.put((rank, None, traceback.format_exc()))
        else:
            outbox.put((rank, result.getvalue(), None))


def same_everywhere(results: Sequence[Any]) -> bool:
    """Whether dicts of tensors, of the processes, are equal bit for bit."""
    first, *others = results
    return all(
        other.keys() == first.keys() and all(torch.equal(first[name], other[name]) for name in first)
        for other in others
    )
