"""Trials before a run leave no trace in its output."""

from __future__ import annotations

import contextlib
import io
import logging
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
