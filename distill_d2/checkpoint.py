"""Read checkpoints without running code from them, and write them so that none is ever lost."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from typing import Any, Dict

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager

try:  # numpy 2
    from numpy._core.multiarray import _reconstruct, scalar
except ImportError:  # numpy 1
    from numpy.core.multiarray import _reconstruct, scalar

_READ_ERRORS = (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, ValueError)


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
        if module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            module, functions = "", {"_reconstruct": _reconstruct, "scalar": scalar}
            if name in functions:
                return functions[name]
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

    def load(self, path: str, *args: Any, **kwargs: Any) -> Dict[str, Any]:
        """As detectron2's. Raises OSError or ValueError, naming the file, if it cannot be read."""
        if path and "://" not in path and not os.path.isfile(path):
            raise FileNotFoundError(f"checkpoint '{path}' does not exist")
        return super().load(path, *args, **kwargs)

    def _load_model(self, checkpoint: Dict[str, Any]):
        self.incompatible = super()._load_model(checkpoint)
        return self.incompatible

    def _load_file(self, filename: str) -> Dict[str, Any]:
        try:
            if filename.endswith(".pkl"):
                return _detectron_format(_unpickle(filename))
            return super()._load_file(filename)
        except _READ_ERRORS as error:
            raise ValueError(
                f"cannot read the checkpoint '{filename}': {error}. It may be truncated (download "
                "or copy it again), or hold objects other than tensors, which are not loaded"
            ) from error

    def _torch_load(self, filename: str) -> Dict[str, Any]:
        return torch.load(filename, map_location="cpu", weights_only=True)


def _unpickle(filename: str) -> Dict[str, Any]:
    with PathManager.open(filename, "rb") as file:
        return ArrayUnpickler(io.BytesIO(file.read()), encoding="latin1").load()


def _detectron_format(data: Dict[str, Any]) -> Dict[str, Any]:
    """The three kinds of .pkl: detectron2's zoo, Detectron 1's, and ImageNet weights from Caffe2."""
    if "model" in data and "__author__" in data:
        return data
    blobs = data.get("blobs", data)
    weights = {name: blob for name, blob in blobs.items() if not name.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
