"""Read checkpoints without running code from them, and write them so that none is ever lost."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager

try:  # numpy 2
    from numpy._core.multiarray import _reconstruct, scalar
    from numpy._core.numeric import _frombuffer
except ImportError:  # numpy 1
    from numpy.core.multiarray import _reconstruct, scalar
    from numpy.core.numeric import _frombuffer

_ARRAY_FUNCTIONS = {
    "multiarray._reconstruct": _reconstruct,
    "multiarray.scalar": scalar,
    "numeric._frombuffer": _frombuffer,  # of pickle's protocol 5
}
_HUGGING_FACE = ("https://huggingface.co/", "https://hf.co/")
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


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles dicts, lists, strings, numbers and numpy arrays; refuses everything else.

    detectron2's model zoo files (.pkl) need no more; any other global in a pickle is code.
    """

    _ALLOWED = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): __import__("_codecs").encode,
        ("collections", "OrderedDict"): __import__("collections").OrderedDict,
    }

    def find_class(self, module: str, name: str) -> Any:
        package, _, submodule = module.rpartition(".")
        if package in ("numpy.core", "numpy._core"):
            function = _ARRAY_FUNCTIONS.get(f"{submodule}.{name}")
            if function is not None:
                return function
        if (module, name) in self._ALLOWED:
            return self._ALLOWED[module, name]
        raise pickle.UnpicklingError(
            f"it wants to use {module}.{name}; only numpy arrays, numbers, strings, lists and dicts "
            "are read"
        )


class SafeCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer, minus code execution and half-written files.

    Attributes:
        incompatible: after ``load``, the missing, unexpected and mis-shaped keys.
    """

    incompatible = None
    _exact = False
    _with_losses = True

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``name``.pth under a temporary name first, so that an interruption, or a full disk,
        leaves an older file of that name whole."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update({key: obj.state_dict() for key, obj in self.checkpointables.items()})
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        partial = f"{path}.partial"
        with open(partial, "wb") as file:
            torch.save(data, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        self.tag_last_checkpoint(os.path.basename(path))

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As detectron2's. Raises OSError or ValueError, naming the file, if it cannot be read."""
        path = direct_address(path)
        if path and "://" not in path and not os.path.isfile(path.partition("?")[0]):
            raise FileNotFoundError(f"checkpoint '{path}' does not exist")
        if "://" in path:
            _download(path.partition("?")[0])
        return super().load(path, *args, **kwargs)

    def resume_or_load(
        self, path: str, *, resume: bool = True, with_losses: bool = True
    ) -> dict[str, Any]:
        """As fvcore's; to resume, the last checkpoint must be of exactly this model.

        Args:
            with_losses: and of the same losses; False: only the model is wanted.

        Raises:
            ValueError: it is of another one; the message lists keys.
        """
        self._exact = resume and self.has_checkpoint()
        self._with_losses = with_losses
        return super().resume_or_load(path, resume=resume)

    def _load_model(self, checkpoint: dict[str, Any]):
        self.incompatible = super()._load_model(checkpoint)
        if self._exact:
            self._check_exact(checkpoint)
        return self.incompatible

    def _check_exact(self, checkpoint: dict[str, Any]) -> None:
        keys = self.incompatible
        mis_shaped = [name for name, _, _ in keys.incorrect_shapes]
        losses = self.checkpointables.get("distiller")
        ours = set(losses.state_dict()) if losses is not None else set()
        theirs = set(checkpoint.get("distiller", {}))
        wrong = {
            "missing": [name for name in keys.missing_keys if name not in mis_shaped],
            "unknown": keys.unexpected_keys,
            "of another shape": mis_shaped,
            "of other losses": sorted(ours ^ theirs) if self._with_losses else [],
        }
        if any(wrong.values()):
            listing = "; ".join(f"{len(v)} {k}: {v[:5]}" for k, v in wrong.items() if v)
            raise ValueError(
                f"--resume: the checkpoint {self.get_checkpoint_file()} is of another model "
                f"({listing}). Use another OUTPUT_DIR, or start without --resume"
            )

    def _load_file(self, filename: str) -> dict[str, Any]:
        with _naming(filename):
            if filename.endswith(".pkl"):
                return _detectron_format(_unpickle(filename))
            if filename.endswith(".pyth"):
                return _pycls_format(self._torch_load(filename))
            return super()._load_file(filename)

    def _torch_load(self, filename: str) -> dict[str, Any]:
        return _torch_load(filename)


def read_checkpoint(path: str, *, unread: Sequence[str] = ()) -> dict[str, Any]:
    """All entries of a checkpoint of a training (.pth), on the CPU.

    Args:
        path: path or URL.
        unread: names such as "argparse.Namespace" of classes that the file may use although nobody
            needs their objects; each of these becomes an ``Unread``. torch 2.3 cannot, and refuses them.

    Raises:
        OSError, ValueError: it does not exist or cannot be read; the message names it.
    """
    path = direct_address(path)
    if "://" not in path and not os.path.isfile(path):
        raise FileNotFoundError(f"checkpoint '{path}' does not exist")
    path = _download(path) if "://" in path else path
    with _naming(path), _reading_as_nothing(unread):
        entries = _torch_load(path)
    if not isinstance(entries, dict):
        raise ValueError(f"'{path}' holds a {type(entries).__name__}, not the entries of a checkpoint")
    return entries


def direct_address(path: str) -> str:
    """The address of a file itself, where ``path`` is that of its page at huggingface.co, or asks for a
    download; anything else as it is."""
    if not path or not path.startswith(_HUGGING_FACE):
        return path
    address = urlsplit(path)
    query = [part for part in address.query.split("&") if not part.startswith("download")]
    direct = address.path.replace("/blob/", "/resolve/", 1)
    return address._replace(path=direct, query="&".join(query)).geturl()


def _download(address: str) -> str:
    """The path of the file, which is kept in the cache."""
    try:
        return PathManager.get_local_path(address)
    except OSError as error:
        raise ValueError(
            f"the checkpoint '{address}' could not be downloaded: {_reason(error)}. Download it by other "
            "means and give its path (MODEL.WEIGHTS; of a teacher MODEL.DISTILLER.TEACHER_WEIGHTS)"
        ) from error


class Unread:
    """Stands for an object of a checkpoint; holds nothing of it."""

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _reading_as_nothing(names: Sequence[str]) -> contextlib.AbstractContextManager[None]:
    # torch recognises a class by its module and name, so that one of ours can stand in for any.
    parts = [name.rpartition(".") for name in names]
    stand_ins = [type(name, (Unread,), {"__module__": module}) for module, _, name in parts]
    if hasattr(torch.serialization, "safe_globals"):
        return torch.serialization.safe_globals(stand_ins)
    if hasattr(torch.serialization, "add_safe_globals"):  # torch 2.4: until the process ends
        torch.serialization.add_safe_globals(stand_ins)
    return contextlib.nullcontext()


def _torch_load(filename: str) -> Any:
    return torch.load(filename, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def _naming(filename: str) -> Iterator[None]:
    """Errors of reading a file become a ValueError that names it; OSErrors that do so stay."""
    try:
        yield
    except (*_READ_ERRORS, OSError) as error:
        if isinstance(error, OSError) and error.filename:  # not readable, and it says which
            raise
        raise ValueError(
            f"cannot read the checkpoint '{filename}': {_reason(error)}. It may be truncated "
            "(download or copy it again), or hold objects other than tensors, which are not loaded"
        ) from error


def _unpickle(filename: str) -> dict[str, Any]:
    with PathManager.open(filename, "rb") as file:
        return ArrayUnpickler(io.BytesIO(file.read()), encoding="latin1").load()


def _detectron_format(data: dict[str, Any]) -> dict[str, Any]:
    """The three kinds of .pkl: detectron2's zoo, Detectron 1's, and ImageNet weights from Caffe2."""
    if "model" in data and "__author__" in data:
        return data
    blobs = data.get("blobs", data)
    weights = {name: blob for name, blob in blobs.items() if not name.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _pycls_format(data: dict[str, Any]) -> dict[str, Any]:
    weights = data["model_state"]
    weights = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    return {"model": weights, "__author__": "pycls", "matching_heuristics": True}


def _reason(error: Exception) -> str:
    """One line; without torch's advice to load the file in a way that runs its code."""
    text = str(error).strip() or type(error).__name__
    if not text.startswith("Weights only load failed"):
        return text.splitlines()[0]
    found = re.search(r"GLOBAL (\S+)", text)
    return f"it wants to use {found.group(1)}" if found else "it is no file of torch.save"
