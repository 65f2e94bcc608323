"""A frozen teacher's outputs, kept by image, so that it is run once for each: MODEL.DISTILLER.TEACHER_CACHE.

cache        gives a step's outputs, computed or kept
layout       what of the outputs is kept, as a list of tensors per image
fingerprint  what a teacher's outputs depend on
plan         how much there will be to keep
memory       keeps them in the memory of a process
folder       keeps them in a folder, for several runs
"""

from .cache import TeacherCache
from .fingerprint import fingerprint
from .folder import FolderStore
from .layout import Layout
from .memory import MemoryStore
from .plan import CachePlan
from .settings import GIGABYTE, CacheSettings

__all__ = [
    "GIGABYTE",
    "CachePlan",
    "CacheSettings",
    "FolderStore",
    "Layout",
    "MemoryStore",
    "TeacherCache",
    "fingerprint",
]
