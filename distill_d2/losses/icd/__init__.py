"""ICD in parts: sampling -> descriptor -> decoder -> auxiliary task, and the student's values."""

from .loss import InstanceConditionalDistillation

__all__ = ["InstanceConditionalDistillation"]
