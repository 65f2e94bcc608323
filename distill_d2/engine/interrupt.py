"""Stop cleanly on Ctrl-C or a scheduler's SIGTERM."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Callable

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """Training was asked to stop, has finished its step and saved a checkpoint.

    Not an Exception, so that nothing logs it as a failure.
    """


class StopRequest:
    """Whether a signal asked this process to stop.

    Attributes:
        signal: its number; None if there was none.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """The exit status of a process that the signal stopped."""
        return 128 + (self.signal or 0)


@contextlib.contextmanager
def stop_request(request: StopRequest) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM are only noted, so that the current step can finish."""

    def note(number, _frame):
        request.signal = number

    with _handling(note):
        yield


@contextlib.contextmanager
def forwarding_signals() -> Iterator[StopRequest]:
    """Inside, SIGINT and SIGTERM are forwarded to this process's children, which stop by themselves."""
    request = StopRequest()

    def forward(number, _frame):
        request.signal = number
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, number)

    with _handling(forward):
        yield request


@contextlib.contextmanager
def _handling(handler: Callable) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # Python allows only the main thread to handle signals
        return
    previous = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
