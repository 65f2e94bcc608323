"""The keys TEACHER_CACHE of MODEL.DISTILLER."""

from __future__ import annotations

from dataclasses import dataclass

GIGABYTE = 2**30


@dataclass(frozen=True)
class CacheSettings:
    """Where a teacher's outputs are kept.

    Attributes:
        place: "" for nowhere, "memory", or a folder.
        gigabytes: the most that is kept: by a process in memory, or in the folder by all runs together.
        half: in float16, which is not exact.
    """

    place: str = ""
    gigabytes: float = 4.0
    half: bool = False

    @property
    def in_memory(self) -> bool:
        return self.place == "memory"

    @property
    def limit(self) -> int:
        """In bytes."""
        return int(self.gigabytes * GIGABYTE)
