"""Trials before a run leave no trace in its output."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing inside is logged or printed, but what ``tell`` logs."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)


def tell(logger: logging.Logger, text: str) -> None:
    """Log a warning, also while all is quiet."""
    level = logging.root.manager.disable
    logging.disable(logging.NOTSET)
    try:
        logger.warning(text)
    finally:
        logging.disable(level)


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Without the warnings and logs of a trace: what is recorded as a constant, what is not counted."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
