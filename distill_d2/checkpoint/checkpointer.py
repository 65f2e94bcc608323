"""detectron2's checkpointer, without code execution and without half-written files."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer

from ..kernels import plain_layout
from .addresses import direct_address, local_file
from .choosing import LAST, choose
from .initial import check_backbones, initial_weights, load_initial_weights
from .integrity import check_finite, check_weights
from .reading import errors_name_file, read_pickle, read_pycls, read_torch
from .writing import write_whole

logger = logging.getLogger(__name__)

_KEY = "MODEL.WEIGHTS (of a LazyConfig train.init_checkpoint)"


class SafeCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer, without code execution and without half-written files.

    Attributes:
        incompatible: after ``load``, the missing, unexpected and mis-shaped keys.
    """

    incompatible: Any = None
    _resumed_from = ""
    _with_losses = True
    _chosen: str | None = None

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``name``.pth; an interruption or a full disk leaves older files intact.

        Raises:
            OSError: it cannot be written; the message names the file.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update({key: obj.state_dict() for key, obj in self.checkpointables.items()})
        self._write(f"{name}.pth", {**data, **kwargs})
        self.tag_last_checkpoint(f"{name}.pth")
        self._chosen = None

    def save_weights(self, name: str, **kwargs: Any) -> None:
        """Write the model alone to the file ``name``, which does not become the last checkpoint. Raises OSError as
        ``save``."""
        if self.save_dir and self.save_to_disk:
            self._write(name, {"model": self.model.state_dict(), **kwargs})

    def _write(self, name: str, data: dict[str, Any]) -> None:
        path = os.path.join(self.save_dir, name)
        logger.info(f"Saving checkpoint to {path}")
        data = plain_layout(data)
        write_whole(path, lambda file: torch.save(data, file))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write the name of the newest checkpoint, a hint for --resume."""
        content = last_filename_basename.encode()
        write_whole(os.path.join(self.save_dir, LAST), lambda file: file.write(content))

    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to resume from. Raises ValueError as ``get_checkpoint_file``."""
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """The newest whole checkpoint (see ``choose``); "" if the folder has none, torn or whole. One line in
        the log says what is wrong with others.

        Raises:
            ValueError: there are checkpoints, but none is whole and holds what this checkpointer loads.
        """
        if self._chosen is None:
            self._chosen = self._choose() if self.save_dir else ""
        return self._chosen

    def _choose(self) -> str:
        choice = choose(self.save_dir, with_trainer="trainer" in self.checkpointables)
        if choice.problems and not choice.path:
            raise ValueError(
                f"--resume: no checkpoint in '{self.save_dir}' can be continued from: "
                f"{'; '.join(choice.problems)}. Use another OUTPUT_DIR, or start again with --overwrite"
            )
        if choice.problems:
            logger.warning(
                f"--resume: {choice.path} (iteration {choice.iteration}) is the newest whole checkpoint; "
                f"{'; '.join(choice.problems)}"
            )
        return choice.path

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
        """Like fvcore's; a checkpoint that is resumed must match this model exactly. Without any, the modules that
        have pretrained weights of their own load them.

        Args:
            with_losses: it must also match the losses; False if only the model is needed.

        Raises:
            ValueError: it is from another model, or from other losses, or no tensor of ``path`` fits; the message
                lists keys. ``path`` lacks tensors of a backbone with weights of its own.
            FileNotFoundError: ``path`` does not exist.
        """
        self._resumed_from = self.get_checkpoint_file() if resume else ""
        self._with_losses = with_losses
        if self._resumed_from:
            return self.load(self._resumed_from)
        try:
            loaded = self.load(path, checkpointables=[])
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{_KEY}: {error}") from error
        if not path:
            load_initial_weights(self.model)
            return loaded
        self._check_use(path)
        check_backbones(self.model, self._not_loaded(), f"{_KEY} '{path}'")
        self._tell_missing(path)
        return loaded

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        self.incompatible = super()._load_model(checkpoint)
        if self._resumed_from:
            self._check_exact(checkpoint)
        return self.incompatible

    def _check_use(self, path: str) -> None:
        names = [name for name, _ in self.model.named_parameters()]
        if set(names) <= set(self.incompatible.missing_keys):
            start = "those of the backbone alone" if initial_weights(self.model) else "random ones"
            raise ValueError(
                f"{_KEY}: no tensor of '{path}' fits the {type(self.model).__name__}: it has names such as "
                f"{self.incompatible.unexpected_keys[:3]}, the model {names[:3]}. Give weights of this "
                f"model or its backbone, or '' to start from {start}"
            )

    def _not_loaded(self) -> set[str]:
        """The tensors of the model that the last ``load`` did not fill."""
        mis_shaped = {name for name, _, _ in self.incompatible.incorrect_shapes}
        return mis_shaped | set(self.incompatible.missing_keys)

    def _tell_missing(self, path: str) -> None:
        """In one line; fvcore logs each tensor."""
        mis_shaped = self.incompatible.incorrect_shapes
        missing = sorted(self._not_loaded())
        if missing:
            other = f" ({len(mis_shaped)} are there in another shape)" if mis_shaped else ""
            logger.log(
                logging.WARNING if mis_shaped else logging.INFO,
                f"{len(missing)} of the model's {len(self.model.state_dict())} tensors are not taken from {path}"
                f"{other} and stay as they are built: {', '.join(missing[:3])}{', ...' * (len(missing) > 3)}",
            )

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
        with errors_name_file(filename):
            if filename.endswith(".pkl"):
                checkpoint = read_pickle(filename)
            elif filename.endswith(".pyth"):
                checkpoint = read_pycls(filename)
            else:
                checkpoint = super()._load_file(filename)
            check_weights(checkpoint["model"])
            check_finite(checkpoint)
            return checkpoint

    def _torch_load(self, filename: str) -> dict[str, Any]:
        return read_torch(filename)
