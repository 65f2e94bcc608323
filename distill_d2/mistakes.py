"""How programs end: on a user's mistake with its message and status 2, on any other error with its traceback."""

from __future__ import annotations

import argparse
import contextlib
import dis
import errno
import logging
import os
import signal
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from types import FrameType, TracebackType
from typing import NoReturn

from .imports import imported_modules

#: As argparse's, for wrong arguments.
EXIT_STATUS = 2

_KINDS = (ValueError, KeyError, TypeError, OSError, ImportError, FloatingPointError)
# Packages whose ``raise`` statements are about what the user gave; also code that is not installed at all.
_CHECKING = ("distill_d2", "detectron2", "yacs", "fvcore.common.registry")
# Of the machine, wherever they are raised; the message has the file.
_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE)
_INSTALLED = {"site-packages", "dist-packages"}
_LIBRARY = sysconfig.get_path("stdlib")
# The start of messages, of the outermost ``ending_on_mistakes``.
_PREFIX: ContextVar[str] = ContextVar("prefix", default="")


class UnreadableRecord(ValueError):
    """An image or its annotations cannot be read.

    A worker of a data loader hands its error over as text, from which torch makes this exception again.

    Attributes:
        of_worker: the worker's traceback; "" if the training process itself read the image.
    """

    def __init__(self, message: str):
        name = f"{type(self).__module__}.{type(self).__name__}: "
        of_worker, _, own = message.rpartition(name)
        self.of_worker = of_worker
        super().__init__(own.strip())


def is_mistake(error: BaseException) -> bool:
    """Whether an exception is about what the user gave, and its message says all.

    That is one with a message, of the kinds above, which a ``raise`` statement raised, not the interpreter
    (``int("x")``, a missing key of a dict). The statement is in this package, in a user's code, or in a package
    that checks values for us. Or the machine refuses: a full disk or GPU, missing permissions.
    """
    if isinstance(error, UnreadableRecord) or _is_out_of_memory(error):
        return True
    if isinstance(error, OSError) and error.errno in _OF_THE_MACHINE:
        return True
    if not isinstance(error, _KINDS) or not message_of(error):
        return False
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and _is_raise_statement(place) and _checks_input(place.tb_frame)


def message_of(error: BaseException) -> str:
    """What an exception says; a KeyError's without the quotes of repr."""
    if _is_out_of_memory(error):
        return (
            f"{error}\nThe memory of the GPU is too small for this run; lower SOLVER.IMS_PER_BATCH, "
            "INPUT.MIN_SIZE_TRAIN or INPUT.MAX_SIZE_TRAIN, set SOLVER.AMP.ENABLED True, or use more GPUs"
        )
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def add_debug_argument(parser: argparse.ArgumentParser) -> None:
    """Add --debug, for ``ending_on_mistakes``."""
    parser.add_argument(
        "--debug", action="store_true", help="show the traceback of an error in the input, too"
    )


class Message:
    """The message of the first of several processes that ends on a mistake, in a file that all of them see."""

    def __init__(self, folder: str):
        self._path = Path(folder) / "mistake"

    def write(self, text: str) -> None:
        """Write the text, unless there is one."""
        with contextlib.suppress(FileExistsError), open(self._path, "x", encoding="utf-8") as file:
            file.write(text)

    def read(self) -> str:
        """The text; "" if none was written."""
        return self._path.read_text(encoding="utf-8") if self._path.exists() else ""


def end(text: str) -> NoReturn:
    """Print the text to stderr and end the program.

    Raises:
        SystemExit: with status 2; its str is the text.
    """
    print(text, file=sys.stderr, flush=True)
    exception = SystemExit(text)
    exception.code = EXIT_STATUS
    raise exception


@contextlib.contextmanager
def ending_on_mistakes(
    prefix: str = "", *, debug: bool = False, message: Message | None = None
) -> Iterator[None]:
    """Inside, a user's mistake ends the program; its traceback goes to the log file, if there is one. Ctrl-C
    ends it without a traceback.

    Args:
        prefix: of the message; "": that of the call around this one.
        debug: show the traceback above the message.
        message: takes the text instead of stderr, in one of several processes.

    Raises:
        SystemExit: with status 2, for a mistake; other exceptions pass.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see train_distill.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    token = _PREFIX.set(prefix or _PREFIX.get())
    try:
        with _quiet_training(message):
            yield
    except Exception as error:
        if not is_mistake(error):
            raise
        details, text = _traceback_of(error), _PREFIX.get() + message_of(error)
        _write_to_log_files(details)
        text = f"{details}\n\n{text}" if debug else text
        if message is None:
            end(text)
        message.write(text)
        sys.exit(EXIT_STATUS)
    except KeyboardInterrupt:
        sys.stdout.flush()
        # As Python ends, but for the traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        _PREFIX.reset(token)


def prefixed(text: str) -> str:
    """A message of another process, with the prefix that it has in this one."""
    return _PREFIX.get() + text


def _is_out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")  # not imported for its name: help and wrong arguments need none
    return torch is not None and isinstance(error, torch.cuda.OutOfMemoryError)


def _is_raise_statement(place: TracebackType) -> bool:
    return dis.opname[place.tb_frame.f_code.co_code[place.tb_lasti]] == "RAISE_VARARGS"


def _checks_input(frame: FrameType) -> bool:
    module, path = str(frame.f_globals.get("__name__")), frame.f_code.co_filename
    packages = (*_CHECKING, *imported_modules())
    if any(f"{module}.".startswith(f"{package}.") for package in packages):
        return True
    return not path.startswith(("<", _LIBRARY)) and _INSTALLED.isdisjoint(Path(path).parts)


def _traceback_of(error: BaseException) -> str:
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    return getattr(error, "of_worker", "") + "".join(lines).rstrip()


def _write_to_log_files(text: str) -> None:
    log = logging.getLogger("distill_d2")
    record = log.makeRecord(log.name, logging.ERROR, __file__, 0, text, (), None)
    for handler in log.handlers:
        if os.path.isfile(str(getattr(getattr(handler, "stream", None), "name", ""))):  # not "<stdout>"
            handler.handle(record)


@contextlib.contextmanager
def _quiet_training(message: Message | None) -> Iterator[None]:
    """Inside, detectron2's training loop logs no traceback of a mistake, nor of what follows from one in
    another process."""

    def is_shown(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return error is None or not (is_mistake(error) or (message and message.read()))

    log = logging.getLogger("detectron2.engine.train_loop")
    log.addFilter(is_shown)
    try:
        yield
    finally:
        log.removeFilter(is_shown)
