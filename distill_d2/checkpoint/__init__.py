"""Read checkpoints without running code from them, and write them so that an interruption loses none."""

from .addresses import direct_address
from .checkpointer import SafeCheckpointer
from .reading import ArrayUnpickler, UnpickledStub, read_checkpoint

__all__ = [
    "ArrayUnpickler",
    "SafeCheckpointer",
    "UnpickledStub",
    "direct_address",
    "read_checkpoint",
]
