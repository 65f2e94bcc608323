"""Read checkpoints without running code from them."""

from __future__ import annotations

import codecs
import contextlib
import io
import pickle
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.utils.file_io import PathManager

from .addresses import local_file
from .integrity import Refused, check_finite, check_sizes, check_whole, is_zip, what_it_is

# Whatever unpickling a truncated, damaged or hostile file may raise (besides OSError without a file name).
_READ_ERRORS = (
    MemoryError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    zlib.error,
)


class _Array:
    """Stands for numpy.ndarray, which as a function could allocate any size."""


def _reconstruct(*_: Any) -> np.ndarray:
    """An empty array; numpy's own pickles fill it afterwards, where it compares shape and data."""
    return np.empty(0, np.int8)


def _dtype(*args: Any) -> np.dtype:
    dtype = np.dtype(*args)
    if dtype.kind not in _KINDS:
        raise Refused(f"it holds an array of {dtype}; only arrays of numbers are read")
    return dtype


def _scalar(dtype: np.dtype, data: bytes | str) -> Any:
    raw = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(raw, dtype, count=1)[0]


def _frombuffer(buffer: Any, dtype: np.dtype, shape: tuple[int, ...], order: Any) -> np.ndarray:
    return np.frombuffer(buffer, dtype).reshape(shape, order=order)


_KINDS = "biufcSU"  # bool, numbers and texts, of numpy's types


class ArrayUnpickler(pickle._Unpickler):
    """Unpickles dicts, lists, strings, numbers and numpy arrays; refuses everything else.

    detectron2's model zoo files (.pkl) need nothing else; any other global in a pickle is code. This is
    pickle's version in Python: that in C makes room for as many objects as a file claims to number.
    """

    _ALLOWED = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _dtype,
        ("_codecs", "encode"): codecs.encode,
        ("collections", "OrderedDict"): OrderedDict,
        **{
            (f"{package}.{module}", name): function
            for package in ("numpy.core", "numpy._core")  # of numpy 1 and 2
            for module, name, function in (
                ("multiarray", "_reconstruct", _reconstruct),
                ("multiarray", "scalar", _scalar),
                ("numeric", "_frombuffer", _frombuffer),  # of pickle's protocol 5
            )
        },
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._ALLOWED:
            return self._ALLOWED[module, name]
        raise Refused(
            f"it uses {module}.{name}; only numpy arrays, numbers, strings, lists and dicts are read"
        )


def unpickle_arrays(data: bytes) -> Any:
    """What a pickle of dicts, lists, strings, numbers and numpy arrays holds.

    Raises:
        Refused, pickle.UnpicklingError, ...: it holds something else, or asks for more memory than its
            own size justifies.
    """
    return ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()


def read_arrays(path: str, kind: str) -> Any:
    """What a pickle file of plain values and numpy arrays holds.

    Args:
        kind: what the file should be, for messages.

    Raises:
        OSError, ValueError: it cannot be read, or holds something else; the message names it.
    """
    with errors_name_file(path, kind), open(path, "rb") as file:
        return unpickle_arrays(file.read())


def read_checkpoint(path: str, *, stubs: Sequence[str] = ()) -> dict[str, Any]:
    """All entries of a training's checkpoint (.pth), on the CPU.

    Args:
        path: path or URL.
        stubs: classes, such as "argparse.Namespace", of objects in the file that are not needed; an
            ``UnpickledStub`` takes the place of each object. torch 2.3 refuses such files.

    Raises:
        OSError, ValueError: the file does not exist or cannot be read; the message names it.
    """
    path = local_file(path)
    with errors_name_file(path), stub_globals(stubs):
        entries = read_torch(path)
        check_finite(entries)
        return entries


def read_torch(filename: str) -> dict[str, Any]:
    """The entries that torch.save wrote, on the CPU; every record is compared with its checksum.

    Raises:
        Refused, RuntimeError, zipfile.BadZipFile, ...: they cannot be read; see ``errors_name_file``.
    """
    other = what_it_is(filename)
    if other:
        raise Refused(other)
    check_whole(filename)
    entries = torch.load(filename, map_location="cpu", weights_only=True)
    check_sizes(entries, filename)
    if not isinstance(entries, dict):
        raise Refused(f"it holds a {type(entries).__name__}, not the entries of a checkpoint")
    return entries


def read_pickle(filename: str) -> dict[str, Any]:
    """A model of detectron2's zoo, of Detectron 1, or ImageNet weights of Caffe2 (.pkl).

    Raises:
        Refused, pickle.UnpicklingError, ...: it cannot be read; see ``errors_name_file``.
    """
    if is_zip(filename):
        raise Refused("torch.save wrote it; rename it to .pth")
    with PathManager.open(filename, "rb") as file:
        return _detectron_format(unpickle_arrays(file.read()))


def read_pycls(filename: str) -> dict[str, Any]:
    """A model of pycls (.pyth).

    Raises:
        Refused, RuntimeError, ...: it cannot be read; see ``errors_name_file``.
    """
    weights = read_torch(filename).get("model_state", {})
    weights = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    return {"model": weights, "__author__": "pycls", "matching_heuristics": True}


class UnpickledStub:
    """Takes the place of an object in a checkpoint, without its data."""

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def stub_globals(names: Sequence[str]) -> contextlib.AbstractContextManager[None]:
    """Inside, torch reads objects of these classes as stubs."""
    # torch recognizes a class by its module and name, so that the stub can take its place.
    parts = [name.rpartition(".") for name in names]
    stubs: list[Any] = [
        type(name, (UnpickledStub,), {"__module__": module}) for module, _, name in parts
    ]
    if hasattr(torch.serialization, "safe_globals"):
        return torch.serialization.safe_globals(stubs)
    if hasattr(torch.serialization, "add_safe_globals"):  # torch 2.4: until the process ends
        torch.serialization.add_safe_globals(stubs)
    return contextlib.nullcontext()


@contextlib.contextmanager
def errors_name_file(filename: str, kind: str = "checkpoint") -> Iterator[None]:
    """Turn errors of reading a file into a ValueError that names it; OSErrors that name it stay.

    Args:
        kind: what the file should be, for the message.
    """
    try:
        yield
    except (*_READ_ERRORS, OSError) as error:
        if isinstance(error, OSError) and error.filename:
            raise
        reason = what_it_is(filename) or _reason(error)
        raise ValueError(f"cannot read the {kind} '{filename}': {reason}") from error


def _detectron_format(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise Refused(f"it holds a {type(data).__name__}, not weights by name")
    if "model" in data and "__author__" in data:
        return data
    blobs = data.get("blobs", data)
    weights = {name: blob for name, blob in blobs.items() if not str(name).endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _reason(error: Exception) -> str:
    """One line; without torch's advice to load the file in a way that runs its code."""
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    if isinstance(error, Refused):
        return text
    if "central directory" in text or text == "File is not a zip file":
        return "it is cut off: its end is missing. Copy it again"
    record = re.match(r"Bad CRC-32 for file '[^/]*/?(.*)'", text)
    if record:
        return f"it is damaged: the checksum of its record '{record[1]}' is wrong. Copy it again"
    if isinstance(error, MemoryError) or "alloc" in text:
        return "it asks for more memory than there is; it is damaged, or was made to do harm"
    name = re.search(r"GLOBAL (\S+)", str(error))
    if name and isinstance(error, pickle.UnpicklingError):
        return (
            f"it uses {name[1]}; only tensors, numbers, strings, lists and dicts are read. Of a whole model save "
            "the state_dict()"
        )
    if text.startswith("Weights only load failed"):
        text = "torch.save did not write it"
    return f"{text}. It may be truncated (download or copy it again)"
