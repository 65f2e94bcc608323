"""Write files so that an interruption, or a full disk, loses none and leaves nothing behind."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

PARTIAL = ".partial"  # the ending of files that are being written
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_whole(path: str, write: Callable[[Any], Any]) -> None:
    """Write a temporary file and rename it, so that ``path`` is never half written; its folder is
    created where it is missing.

    Args:
        write: is called with an object that has ``write`` and ``flush``; on a full disk once more, to
            measure.

    Raises:
        OSError: the message names the file, and on a full disk the needed and the free bytes.
    """
    partial, sink = f"{path}{PARTIAL}", _Sink()
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(partial, "wb") as file:
            sink.file = file
            write(sink)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.remove(partial)
        cause = sink.error or error  # torch tells an error of writing in its own words
        if not isinstance(cause, OSError):
            raise
        raise OSError(_message(path, cause, write)) from error


def append_whole(path: str, data: bytes) -> None:
    """Append to a file, all or nothing; its folder is created where it is missing.

    Raises:
        OSError: the message names the file.
    """
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "ab", buffering=0) as file:
            size, rest = os.fstat(file.fileno()).st_size, data
            try:
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError:
                os.ftruncate(file.fileno(), size)
                raise
    except OSError as error:
        raise OSError(_message(path, error, lambda file: file.write(data))) from error


@contextlib.contextmanager
def told_when_full(folder: str) -> Iterator[None]:
    """Inside, an error of a full disk in any file below ``folder`` becomes a message with the free bytes.

    Raises:
        OSError: see above.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        where = error.filename or f"a file in '{folder}'"
        raise OSError(f"cannot write {where}: {error.strerror}{_room(folder)}") from error


class _Sink:
    """A file for torch.save that remembers why writing failed."""

    file: BinaryIO
    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


class _Counter(io.RawIOBase):
    """Counts bytes."""

    size = 0

    def write(self, data: Any) -> int:
        self.size += len(data)
        return len(data)


def _message(path: str, error: OSError, write: Callable[[Any], Any]) -> str:
    text = f"cannot write '{path}': {error.strerror or error}"
    if error.errno not in _FULL:
        return text
    counter = _Counter()
    write(counter)
    return f"{text}; it needs {counter.size} bytes{_room(os.path.dirname(path))}"


def _room(folder: str) -> str:
    free = shutil.disk_usage(folder or ".").free
    return (
        f", {free} are free there (a quota may allow less). Older files are whole: make room, and continue with "
        "--resume"
    )
