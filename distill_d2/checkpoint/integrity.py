"""Whether a file is whole, and what it is if it is not a checkpoint."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

_CHUNK = 1 << 20
# torch.save packs nothing, so that the records of a file are about as large as the file.
_MOST_UNPACKED = 10
_ADVICE = "save its state_dict() with torch.save"
# What files that are not checkpoints begin with, in lower case.
_BEGINNINGS = (
    (b"version https://git-lfs", "it is a pointer of Git LFS; fetch the file with 'git lfs pull'"),
    (b"<", "it is a web page; download the file itself"),
    (b"{", "it is text (JSON), not a checkpoint"),
    (b"[", "it is text (JSON), not a checkpoint"),
    (b"\x89hdf", f"it is an HDF5 file (Keras); load its model and {_ADVICE}"),
    (b"\x1f\x8b", "it is a gzip archive; unpack it"),
)
_FOLDER = 0x10  # of MS-DOS's attributes
_ZIP = b"PK\x03\x04"
_TORCHSCRIPT, _NUMPY = "constants.pkl", ".npy"


class Refused(ValueError):
    """A file is not read; the message, after the file's name, is complete."""


def check_whole(path: str) -> None:
    """Compare every record of a file of torch.save with its checksum (CRC-32), which torch.load does
    not; about 1 GB per second. Formats without checksums pass: torch's before 1.6, and files written with
    ``set_crc32_options(False)``.

    Raises:
        zipfile.BadZipFile, OSError, ...: the file is damaged.
        Refused: its records are packed to far less than their size.
    """
    if not is_zip(path):
        return
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        unpacked, size = sum(record.file_size for record in records), os.path.getsize(path)
        if unpacked > _MOST_UNPACKED * size:
            raise Refused(f"its {size} bytes unpack to {unpacked}, which torch.save does not do")
        # torch gives a record that is marked as a folder memory with whatever was there before.
        if any(record.external_attr & _FOLDER or record.is_dir() for record in records):
            raise Refused("it is damaged: a record is marked as a folder")
        if not any(record.CRC for record in records):
            return
        for record in records:
            with archive.open(record) as file:
                while file.read(_CHUNK):
                    pass


def is_zip(path: str) -> bool:
    """Whether a file begins as a zip archive, as those of torch.save do since torch 1.6."""
    with open(path, "rb") as file:
        return file.read(len(_ZIP)) == _ZIP


def check_sizes(entries: Any, path: str) -> None:
    """Raises Refused if a tensor claims more numbers than the file holds, by strides of zero."""
    size, todo, seen = os.path.getsize(path), [entries], set()
    while todo:
        value = todo.pop()
        if isinstance(value, torch.Tensor):
            if value.numel() * value.element_size() > size:
                raise Refused(
                    f"it holds a tensor of {value.numel()} numbers, but the file has only {size} bytes"
                )
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            todo += value.values() if isinstance(value, dict) else value


def check_weights(weights: Any) -> None:
    """Raises Refused if these are not a model's weights: names and tensors or numpy arrays."""
    if not isinstance(weights, Mapping):
        raise Refused(f"it holds a {type(weights).__name__}, not weights by name")
    wrong = [
        name
        for name, value in weights.items()
        if not isinstance(name, str) or not isinstance(value, (torch.Tensor, np.ndarray))
    ]
    if wrong or not weights:
        raise Refused(
            'it holds no weights of a model: expected tensors by name, alone or as the entry "model"; found '
            f"{sorted(map(str, weights))[:5]}, of which {list(map(str, wrong))[:5]} are not tensors"
        )


def check_finite(entries: Mapping[str, Any]) -> None:
    """Raises Refused if tensors of a checkpoint (weights, optimizers' states) hold NaN or infinity."""
    bad: list[str] = []
    todo: list[tuple[str, Any]] = [("", entries)]
    while todo:
        name, value = todo.pop()
        if isinstance(value, (Mapping, list, tuple)):
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            todo += [(f"{name}.{key}" if name else str(key), item) for key, item in items]
            continue
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            value = torch.as_tensor(value)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not is_finite(value):
            count = int((~torch.isfinite(value)).sum())
            bad.append(f"{name} ({count} of {value.numel()} numbers)")
    if bad:
        raise Refused(
            f"it holds NaN or infinity in {len(bad)} tensors: {', '.join(sorted(bad)[:5])}. The training that "
            "wrote it has diverged; give an earlier checkpoint (with --resume: remove this file)"
        )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers of a tensor are finite."""
    return bool(torch.isfinite(tensor).all())


def what_it_is(path: str) -> str:
    """A file that is known to be no checkpoint, in words; "" if it is not known."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(512)
    if not size:
        return "it is empty"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for beginning, words in _BEGINNINGS:
        if text.startswith(beginning):
            return words
    if head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < size:
        return f"it is a safetensors file; load it with safetensors.torch.load_file and {_ADVICE}"
    if not any(head):
        return "it begins with zeros only, as after a crash of the machine"
    if is_zip(path):
        return _kind_of_zip(path)
    return ""


def _kind_of_zip(path: str) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, RuntimeError, ValueError):
        return ""
    if any(name.endswith(_TORCHSCRIPT) for name in names):
        return f"it is a TorchScript archive; load it with torch.jit.load and {_ADVICE}"
    if any(name.endswith(_NUMPY) for name in names):
        return "it is an archive of numpy (.npz); save its arrays as tensors with torch.save"
    if not any(name.endswith("data.pkl") for name in names):
        return f"it is a zip archive of {names[:3]}; unpack it"
    return ""
