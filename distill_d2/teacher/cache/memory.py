"""Keep a teacher's outputs in the memory of a process."""

from __future__ import annotations

import logging

from .layout import Entry, size_of

logger = logging.getLogger(__name__)


class MemoryStore:
    """First come, first kept: images come in turn, so what replaced others would be replaced before it is read.

    Attributes:
        size: bytes that are kept.
        full: whether something was refused.
    """

    def __init__(self, limit: int):
        """
        Args:
            limit: bytes.
        """
        self.size = 0
        self.full = False
        self._limit = limit
        self._entries: dict[str, Entry] = {}

    def get(self, name: str) -> Entry | None:
        return self._entries.get(name)

    def put(self, name: str, entry: Entry) -> None:
        """Keep an entry, unless the limit is reached."""
        size = size_of(entry)
        if self.size + size > self._limit:
            if not self.full:
                logger.warning(
                    "TEACHER_CACHE_GB is used up: the teacher is run again for the images that are not kept"
                )
            self.full = True
            return
        if name not in self._entries:
            self._entries[name] = entry
            self.size += size
