"""Teachers: build, load, verify, freeze and run one."""

from .cache import CacheSettings
from .loading import (
    build_teacher,
    in_official_zoo,
    load_teacher,
    load_teacher_weights,
    teacher_of,
    teacher_weights,
    untrained_teacher,
)
from .running import AUTOCAST_CHOICES, Teacher

__all__ = [
    "AUTOCAST_CHOICES",
    "CacheSettings",
    "Teacher",
    "build_teacher",
    "in_official_zoo",
    "load_teacher",
    "load_teacher_weights",
    "teacher_of",
    "teacher_weights",
    "untrained_teacher",
]
