"""From a folder of data to configs of a teacher, a student and its distillation that fit it."""

from .proposing import propose

__all__ = ["propose"]
