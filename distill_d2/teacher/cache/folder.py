"""Keep a teacher's outputs in a folder, which several runs share."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import logging
import os
import struct
import time
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import torch

from ...checkpoint import PARTIAL
from .fingerprint import as_bytes
from .layout import Entry

logger = logging.getLogger(__name__)

_MAGIC = b"d2teach1"
_HEAD = struct.Struct("<8sII")  # magic, length of the header, checksum of header and data
_ALIGNED = 64  # bytes
# Of tensors, by the names in files.
_TYPES = {
    str(kind).rpartition(".")[2]: kind
    for kind in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
        *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    )
}
_USAGE = "usage.lock"
_ABANDONED = 3600  # seconds after which a file that is being written is taken to be left by a kill


class FolderStore:
    """A file for each entry, in a subfolder for each teacher.

    A file appears whole, by renaming, and its checksum is compared when it is read; what is damaged is computed
    and written again. The bytes of all files are counted in one that is locked while it is changed. A full disk
    ends the keeping, not the run.
    """

    def __init__(self, folder: str, teacher: str, limit: int, about: str = ""):
        """
        Args:
            folder: is created where it is missing.
            teacher: its fingerprint.
            limit: bytes, of all teachers together.
            about: the teacher, for the reader of the folder.

        Raises:
            OSError: the folder cannot be written to.
        """
        self._folder = os.path.join(folder, teacher)
        self._usage = os.path.join(folder, _USAGE)
        self._limit = limit
        self._keeping = True
        self._written = 0
        try:
            os.makedirs(self._folder, exist_ok=True)
            with open(os.path.join(self._folder, "about.txt"), "w") as file:
                file.write(f"{about}\n")
            with self._counted() as usage:
                self.size = _count(folder)
                _write_number(usage, self.size)
        except OSError as error:
            raise OSError(
                f"MODEL.DISTILLER.TEACHER_CACHE: the folder '{folder}' cannot be written to: {error}. Give "
                "another one, or 'memory'"
            ) from error

    def get(self, name: str) -> Entry | None:
        """The entry; None if there is none, or a damaged one."""
        try:
            with open(self._path(name), "rb") as file:
                return read_entry(file)
        except (OSError, ValueError, KeyError):
            return None

    def put(self, name: str, entry: Entry) -> None:
        """Write an entry, unless the limit is reached or the disk is full."""
        if not self._keeping:
            return
        header, size = _header(entry)
        try:
            if self._reserve(_HEAD.size + len(header) + size):
                self._write(self._path(name), header, entry)
                return
            reason = "TEACHER_CACHE_GB is used up"
        except OSError as error:
            reason = f"nothing more can be written to '{self._folder}' ({error})"
        self._keeping = False
        logger.warning(f"{reason}: the teacher is run again for the images that are not kept")

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, name[:2], name)

    def _write(self, path: str, header: bytes, entry: Entry) -> None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self._written += 1
        partial = f"{path}.{os.uname().nodename}-{os.getpid()}-{self._written}{PARTIAL}"
        try:
            with open(partial, "wb") as file:
                write_entry(file, header, entry)
            os.replace(
                partial, path
            )  # not flushed to the disk before: the checksum tells what a crash leaves
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(partial)
            raise

    def _reserve(self, size: int) -> bool:
        with self._counted() as usage:
            used = int(usage.read() or 0)
            if used + size > self._limit:
                return False
            _write_number(usage, used + size)
            return True

    @contextlib.contextmanager
    def _counted(self) -> Iterator[BinaryIO]:
        """The file with the number of bytes; other processes wait. The kernel ends the lock of a killed one."""
        with open(os.open(self._usage, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0) as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            yield file


def write_entry(file: Any, header: bytes, entry: Entry) -> None:
    """Write an entry with its ``_header``."""
    parts = [as_bytes(_in_memory_order(tensor)) for tensor in entry if not tensor.is_meta]
    checksum = zlib.crc32(header)
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    file.write(_HEAD.pack(_MAGIC, len(header), checksum))
    file.write(header)
    for part in parts:
        file.write(part)


def read_entry(file: BinaryIO) -> Entry:
    """Read what ``write_entry`` wrote. Raises ValueError or KeyError if it is damaged."""
    content = bytearray(os.fstat(file.fileno()).st_size)
    file.readinto(content)  # type: ignore[attr-defined]
    if len(content) < _HEAD.size:
        raise ValueError("it is incomplete")
    magic, length, checksum = _HEAD.unpack_from(content)
    if magic != _MAGIC or zlib.crc32(memoryview(content)[_HEAD.size :]) != checksum:
        raise ValueError("it is damaged")
    place = _HEAD.size + length
    entry: Entry = []
    for shape, dtype, last, kept in json.loads(content[_HEAD.size : place]):
        kind = _TYPES[dtype]
        if not kept:
            entry.append(torch.empty(shape, dtype=kind, device="meta"))
            continue
        stored = [shape[0], *shape[2:], shape[1]] if last else shape
        count = torch.Size(stored).numel()
        tensor = torch.frombuffer(content, dtype=kind, count=count, offset=place).view(stored)
        entry.append(tensor.movedim(-1, 1) if last else tensor)
        place += count * kind.itemsize
    return entry


def _header(entry: Entry) -> tuple[bytes, int]:
    """Shapes and types of an entry, and the bytes of its numbers."""
    described = [
        [list(t.shape), str(t.dtype).rpartition(".")[2], _is_channels_last(t), not t.is_meta]
        for t in entry
    ]
    text = json.dumps(described).encode()
    text += b" " * (-(len(text) + _HEAD.size) % _ALIGNED)
    return text, sum(tensor.nbytes for tensor in entry if not tensor.is_meta)


def _is_channels_last(tensor: torch.Tensor) -> bool:
    return tensor.dim() == 4 and not tensor.is_contiguous()


def _in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.movedim(1, -1) if _is_channels_last(tensor) else tensor


def _count(folder: str) -> int:
    """The bytes of all files; those that a killed run began are removed."""
    total, now = 0, time.time()
    for path in glob.iglob(os.path.join(glob.escape(folder), "*", "*", "*")):
        with contextlib.suppress(OSError):  # another run renames it
            found = os.stat(path)
            if path.endswith(PARTIAL) and now - found.st_mtime > _ABANDONED:
                os.remove(path)
            else:
                total += found.st_size
    return total


def _write_number(file: BinaryIO, number: int) -> None:
    file.seek(0)
    file.truncate()
    file.write(str(number).encode())
