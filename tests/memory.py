"""Pytest plugin: passed tests leave no captured output and no freed memory behind, and a parallel run prints its
peak of memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import threading

import psutil
import pytest

_GROWTH = 150e6  # bytes by which a process may grow before it gives memory back
_INTERVAL = 2.0  # seconds between two measurements
_LOGGERS = ("detectron2", "fvcore", "distill_d2")  # those that a run's setup gives handlers


def pytest_configure(config):
    if "P" not in config.option.reportchars and "A" not in config.option.reportchars:
        config.pluginmanager.register(_SmallReports())
    if hasattr(ctypes.CDLL(None), "malloc_trim"):  # of glibc
        config.pluginmanager.register(_FreedMemory())
    if config.getoption("numprocesses", None):
        config.pluginmanager.register(_PeakMemory())


class _SmallReports:
    """The controller keeps all reports until the end; a whole run's log in each of them took gigabytes."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report):
        if report.passed:
            report.sections.clear()


class _FreedMemory:
    """Gives what a test has freed back to the system: models in reference cycles, and pages that malloc keeps, add
    up to gigabytes."""

    def __init__(self):
        self.process = psutil.Process()
        self.trim = ctypes.CDLL(None).malloc_trim
        self.least = float("inf")

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self):
        self.least = min(self.least, self._size())
        if self._size() > self.least + _GROWTH:
            gc.collect()
            self.trim(0)
            self.least = self._size()

    def _size(self):
        return self.process.memory_info().rss


class _PeakMemory:
    """Measures this process and all that descend from it, in a thread."""

    def __init__(self):
        self.peak: list[int] = []  # bytes of each process, when their sum was largest
        self.stop = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        while not self.stop.wait(_INTERVAL):
            self.peak = max(self.peak, _memory_of_processes(), key=sum)

    def pytest_terminal_summary(self, terminalreporter):
        self.stop.set()
        shares = ", ".join(f"{size / 1e9:.1f}" for size in sorted(self.peak, reverse=True))
        terminalreporter.write_line(
            f"peak memory of all processes together: {sum(self.peak) / 1e9:.1f} GB ({shares})"
        )


def _memory_of_processes() -> list[int]:
    """Bytes per process, by proportional set size where the system knows it: shared pages count once."""
    this, sizes = psutil.Process(), []
    for process in [this, *this.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):  # it has just ended
            info = process.memory_full_info()
            sizes.append(getattr(info, "pss", info.rss))
    return sizes


@pytest.fixture(autouse=True)
def _no_handlers_of_earlier_runs():
    """detectron2 adds handlers with every run: each line would also go to the logs of all earlier runs."""
    yield
    for name in _LOGGERS:
        logging.getLogger(name).handlers.clear()
