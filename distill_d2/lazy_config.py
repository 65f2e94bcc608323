"""Load a LazyConfig (.py). It is code, and it is run."""

from __future__ import annotations

import traceback
from collections.abc import Sequence

from detectron2.config import LazyConfig
from omegaconf import DictConfig, OmegaConf

from .messages import shortened

_MISSING = object()
# hydra needs seconds to refuse longer ones.
_MOST_CHARACTERS = 5_000


def load_lazy_config(path: str, required: Sequence[str]) -> DictConfig:
    """Run a LazyConfig file.

    Args:
        required: dotted names of what it must define.

    Raises:
        ValueError: it is not Python, its code fails, or it lacks something; the message names the line.
    """
    try:
        cfg = LazyConfig.load(path)
    except Exception as error:  # its code may raise anything
        raise ValueError(
            f"config file '{path}', a LazyConfig{_place(error, path)}: {_reason(error)}"
        ) from error
    missing = [name for name in required if OmegaConf.select(cfg, name, default=_MISSING) is _MISSING]
    if missing:
        raise ValueError(f"config file '{path}', a LazyConfig, does not define {', '.join(missing)}")
    return cfg


def apply_overrides(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """Change a LazyConfig by path.key=value pairs.

    Raises:
        ValueError: hydra cannot read a pair, or the config cannot take it.
    """
    for override in overrides:
        if len(override) > _MOST_CHARACTERS:
            raise ValueError(
                f"'{shortened(override)}' has {len(override)} characters; expected at most {_MOST_CHARACTERS}"
            )
        try:
            cfg = LazyConfig.apply_overrides(cfg, [override])
        except Exception as error:  # of hydra, antlr and omegaconf
            raise ValueError(f"'{shortened(override)}' cannot be applied: {_reason(error)}") from error
    return cfg


def _place(error: Exception, path: str) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, SyntaxError) else error
    if isinstance(cause, SyntaxError):
        return f", line {cause.lineno}" if cause.lineno else ""
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path
    ]
    return f", line {lines[-1]}" if lines else ""


def _reason(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, SyntaxError) else error
    text = cause.msg if isinstance(cause, SyntaxError) else str(cause)
    return f"{type(cause).__name__}: {shortened((text.splitlines() or [''])[0], 200)}"
