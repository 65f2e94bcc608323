"""detectron2's checkpointer, without code execution and without half-written files."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from glob import escape, glob
from typing import Any, BinaryIO

import torch
from detectron2.checkpoint import DetectionCheckpointer

from .addresses import direct_address, local_file
from .reading import errors_name_file, read_checkpoint, read_pickle, read_pycls, read_torch

_LAST = "last_checkpoint"


class SafeCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer, without code execution and without half-written files.

    Attributes:
        incompatible: after ``load``, the missing, unexpected and mis-shaped keys.
    """

    incompatible: Any = None
    _resumed_from = ""
    _with_losses = True

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``name``.pth; an interruption or a full disk leaves an older file intact."""
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update({key: obj.state_dict() for key, obj in self.checkpointables.items()})
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        _write_whole(path, lambda file: torch.save(data, file))
        self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write the name of the newest checkpoint, from which --resume continues."""
        content = last_filename_basename.encode()
        _write_whole(os.path.join(self.save_dir, _LAST), lambda file: file.write(content))

    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to resume from. Raises ValueError as ``get_checkpoint_file``."""
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """The checkpoint that the file last_checkpoint names; "" if there is none.

        Where that file was lost in a crash, is empty, or names a missing file: the newest complete
        training checkpoint.

        Raises:
            ValueError: last_checkpoint names no file, and no other checkpoint is complete.
        """
        tag = os.path.join(self.save_dir, _LAST)
        name = _text(tag)
        path = os.path.join(self.save_dir, name)
        if name and os.path.isfile(path):
            return path
        if self._newest_whole or not os.path.exists(tag):
            return self._newest_whole
        raise ValueError(
            f"--resume: {tag} {_what_is_wrong(name)}, and no checkpoint beside it is complete. Use another "
            "OUTPUT_DIR, or start without --resume"
        )

    @cached_property
    def _newest_whole(self) -> str:
        """The newest checkpoint that can be read. Reads every file, so only used without last_checkpoint."""
        paths = glob(os.path.join(escape(self.save_dir), "model_*.pth")) if self.save_dir else []
        for path in sorted(paths, key=lambda path: (os.path.getmtime(path), path), reverse=True):
            if self._is_whole(path):
                tag = os.path.join(self.save_dir, _LAST)
                self.logger.warning(
                    f"{tag} {_what_is_wrong(_text(tag))}; the newest complete checkpoint is {path}"
                )
                return path
        return ""

    def _is_whole(self, path: str) -> bool:
        try:
            entries = read_checkpoint(path)
        except ValueError:
            return False
        return "model" in entries and ("trainer" in entries or "trainer" not in self.checkpointables)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint like detectron2.

        Raises:
            OSError, ValueError: the file cannot be read; the message names it.
        """
        if path:
            path = direct_address(path)
            local_file(path)
        return super().load(path, *args, **kwargs)

    def resume_or_load(
        self, path: str, *, resume: bool = True, with_losses: bool = True
    ) -> dict[str, Any]:
        """Like fvcore's; a checkpoint that is resumed must match this model exactly.

        Args:
            with_losses: it must also match the losses; False if only the model is needed.

        Raises:
            ValueError: it is from another model, or from other losses; the message lists keys.
        """
        self._resumed_from = self.get_checkpoint_file() if resume else ""
        self._with_losses = with_losses
        if self._resumed_from:
            return self.load(self._resumed_from)
        return self.load(path, checkpointables=[])

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        self.incompatible = super()._load_model(checkpoint)
        if self._resumed_from:
            self._check_exact(checkpoint)
        return self.incompatible

    def _check_exact(self, checkpoint: dict[str, Any]) -> None:
        keys = self.incompatible
        mis_shaped = [name for name, _, _ in keys.incorrect_shapes]
        losses = self.checkpointables.get("distiller")
        names = set(losses.state_dict()) if losses is not None else set()
        saved_names = set(checkpoint.get("distiller", {}))
        wrong = {
            "missing": [name for name in keys.missing_keys if name not in mis_shaped],
            "unknown": keys.unexpected_keys,
            "of another shape": mis_shaped,
            "of other losses": sorted(names ^ saved_names) if self._with_losses else [],
        }
        if any(wrong.values()):
            listing = "; ".join(f"{len(v)} {k}: {v[:5]}" for k, v in wrong.items() if v)
            raise ValueError(
                f"--resume: the checkpoint {self._resumed_from} is from another model "
                f"({listing}). Use another OUTPUT_DIR, or start without --resume"
            )

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pkl"):
            return read_pickle(filename)
        if filename.endswith(".pyth"):
            return read_pycls(filename)
        with errors_name_file(filename):
            return super()._load_file(filename)

    def _torch_load(self, filename: str) -> dict[str, Any]:
        return read_torch(filename)


def _write_whole(path: str, write: Callable[[BinaryIO], Any]) -> None:
    """Write a temporary file and rename it, so that ``path`` is never half written."""
    partial = f"{path}.partial"
    with open(partial, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _text(path: str) -> str:
    """The content of a file; "" if there is none."""
    if not os.path.isfile(path):
        return ""
    with open(path) as file:
        return file.read().strip()


def _what_is_wrong(name: str) -> str:
    return f"names '{name}', which does not exist" if name else "is missing or empty"
