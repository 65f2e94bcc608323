"""Read checkpoints without running code from them, and write them so that an interruption loses none."""

from .addresses import direct_address
from .checkpointer import SafeCheckpointer
from .choosing import LAST, run_checkpoints
from .reading import ArrayUnpickler, UnpickledStub, read_arrays, read_checkpoint
from .writing import PARTIAL, append_whole, told_when_full, write_whole

__all__ = [
    "LAST",
    "PARTIAL",
    "ArrayUnpickler",
    "SafeCheckpointer",
    "UnpickledStub",
    "append_whole",
    "direct_address",
    "read_arrays",
    "read_checkpoint",
    "run_checkpoints",
    "told_when_full",
    "write_whole",
]
