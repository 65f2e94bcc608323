"""Read checkpoints without running code from them."""

from __future__ import annotations

import codecs
import contextlib
import importlib
import io
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.utils.file_io import PathManager

from .addresses import local_file

# Whatever unpickling a truncated or damaged file may raise (besides OSError without a file name).
_READ_ERRORS = (
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
)


def _numpy_core(module: str, name: str) -> Any:
    """A function of numpy's core, whose package was renamed in numpy 2."""
    package = "numpy._core" if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else "numpy.core"
    return getattr(importlib.import_module(f"{package}.{module}"), name)


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles dicts, lists, strings, numbers and numpy arrays; refuses everything else.

    detectron2's model zoo files (.pkl) need nothing else; any other global in a pickle is code.
    """

    _ALLOWED = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): codecs.encode,
        ("collections", "OrderedDict"): OrderedDict,
        **{
            (f"{package}.{module}", name): _numpy_core(module, name)
            for package in ("numpy.core", "numpy._core")  # of numpy 1 and 2
            for module, name in (
                ("multiarray", "_reconstruct"),
                ("multiarray", "scalar"),
                ("numeric", "_frombuffer"),  # of pickle's protocol 5
            )
        },
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._ALLOWED:
            return self._ALLOWED[module, name]
        raise pickle.UnpicklingError(
            f"it uses {module}.{name}; only numpy arrays, numbers, strings, lists and dicts are read"
        )


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
    if not isinstance(entries, dict):
        raise ValueError(f"'{path}' holds a {type(entries).__name__}, not the entries of a checkpoint")
    return entries


def read_torch(filename: str) -> Any:
    """What torch.save wrote, on the CPU."""
    return torch.load(filename, map_location="cpu", weights_only=True)


def read_pickle(filename: str) -> dict[str, Any]:
    """A model of detectron2's zoo, of Detectron 1, or ImageNet weights of Caffe2 (.pkl).

    Raises:
        OSError, ValueError: see ``errors_name_file``.
    """
    with errors_name_file(filename), PathManager.open(filename, "rb") as file:
        return _detectron_format(ArrayUnpickler(io.BytesIO(file.read()), encoding="latin1").load())


def read_pycls(filename: str) -> dict[str, Any]:
    """A model of pycls (.pyth).

    Raises:
        OSError, ValueError: see ``errors_name_file``.
    """
    with errors_name_file(filename):
        weights = read_torch(filename)["model_state"]
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
def errors_name_file(filename: str) -> Iterator[None]:
    """Turn errors of reading a file into a ValueError that names it; OSErrors that name it stay."""
    try:
        yield
    except (*_READ_ERRORS, OSError) as error:
        if isinstance(error, OSError) and error.filename:
            raise
        raise ValueError(
            f"cannot read the checkpoint '{filename}': {_reason(error)}. It may be truncated "
            "(download or copy it again), or hold objects other than tensors, which are not loaded"
        ) from error


def _detectron_format(data: dict[str, Any]) -> dict[str, Any]:
    if "model" in data and "__author__" in data:
        return data
    blobs = data.get("blobs", data)
    weights = {name: blob for name, blob in blobs.items() if not name.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _reason(error: Exception) -> str:
    """One line; without torch's advice to load the file in a way that runs its code."""
    text = str(error).strip() or type(error).__name__
    if not text.startswith("Weights only load failed"):
        return text.splitlines()[0]
    name = re.search(r"GLOBAL (\S+)", text)
    return f"it uses {name.group(1)}" if name else "torch.save did not write it"
