"""Time and peak memory of a function, on a CPU or a GPU."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch

MEGABYTE = 2**20


@dataclass
class Sample:
    """Seconds that one run took: of wall-clock time, of process time, and on a GPU between two events
    of its stream."""

    wall: float
    process: float
    event: float = 0.0


class Meter:
    """Clock and memory gauge of a device.

    Attributes:
        clock: which of a Sample's times ratios are taken of: "event" on a GPU, "process" on a CPU.
        memory_note: what the memory column holds.
        per_row: whether that is each row's own.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.clock = "event" if self.on_gpu else "process"
        self.memory_note = "peak memory above what was held before, as the CUDA allocator counts it"
        if not self.on_gpu:
            self._reset_peak = linux_reset_peak()
            self.memory_note = (
                "peak resident memory above what was held before (VmHWM)"
                if self._reset_peak
                else "peak resident memory of the process so far; this system cannot reset it per row"
            )
        self.per_row = self.on_gpu or self._reset_peak is not None

    def time(self, run: Callable[[], None]) -> Sample:
        repeats = getattr(run, "repeats", 1)
        self._wait()
        wall, process, start = time.perf_counter(), time.process_time(), self._event()
        run()
        end = self._event()
        self._wait()
        wall, process = time.perf_counter() - wall, time.process_time() - process
        event = start.elapsed_time(end) / 1000 if self.on_gpu else 0.0
        return Sample(wall / repeats, process / repeats, event / repeats)

    def peak_memory(self, run: Callable[[], None]) -> float:
        """Megabytes, see ``memory_note``. Not to be timed: it returns cached memory first."""
        release = getattr(run, "release", None)
        if release:
            release()  # what another task left would not be counted as this one's
        gc.collect()
        self._wait()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            run()
            return (torch.cuda.max_memory_allocated(self.device) - before) / MEGABYTE
        if not self._reset_peak:
            run()
            return process_peak() / MEGABYTE
        return_freed_memory()
        self._reset_peak()
        before = linux_status("VmRSS")
        run()
        return (linux_status("VmHWM") - before) / MEGABYTE

    def _event(self) -> torch.cuda.Event | None:
        if not self.on_gpu:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


def linux_reset_peak() -> Callable[[], None] | None:
    """A function that sets VmHWM back to VmRSS; None where there is no such thing."""
    path = Path("/proc/self/clear_refs")

    def reset() -> None:
        path.write_text("5")

    try:
        reset()
        linux_status("VmHWM")
    except (OSError, KeyError):
        return None
    return reset


def linux_status(key: str) -> int:
    """Bytes of an entry of /proc/self/status. Raises KeyError if it is not there."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(values[key].split()[0]) * 1024


def process_peak() -> int:
    import resource  # not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_freed_memory() -> None:
    """Have glibc give freed blocks back, so that the next peak counts all that is allocated."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        pass
