"""Where a run's log goes: all of it to OUTPUT_DIR/log.txt, to the screen what a user wants to read."""

from __future__ import annotations

import logging
import re
import sys

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

_LOGGERS = ("fvcore", "detectron2", "distill_d2")
# Of what is no warning.
_SHOWN = re.compile(
    r"distill_d2\b|detectron2\.(utils\.events|evaluation|engine\.hooks)\b|detectron2\.engine\.defaults: Eval"
)
# Lists of keys, for which distill_d2 has one line; what is no news.
_HIDDEN = re.compile(
    r"Skip loading parameter|Some model parameters or buffers are not found|The checkpoint state_dict contains"
    r"|Fast COCO eval is not built|Preparing results for|Saving results to|Evaluating predictions with"
    r"|Start inference on|Total inference (pure compute )?time"
    r"|The config contains objects that cannot serialize|Config is saved using cloudpickle"
)
_of_last_run: list[tuple[logging.Logger, logging.Handler]] = []


def start_log(folder: str) -> None:
    """Log to ``folder``/log.txt, and on the main process to the screen; no more to where an earlier run of this
    process logged. Call it before ``default_setup``, which adds nothing then, and prints its hundreds of lines to
    the file alone."""
    for logger, handler in _of_last_run:
        logger.removeHandler(handler)
    _of_last_run.clear()
    setup_logger.cache_clear()
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [list(logger.handlers) for logger in loggers]
    rank = comm.get_rank()
    setup_logger(folder, distributed_rank=rank, name="fvcore")  # as default_setup calls it
    setup_logger(folder, distributed_rank=rank)
    setup_logger(folder, distributed_rank=rank, name="distill_d2")
    for logger, handlers in zip(loggers, before):
        added = [handler for handler in logger.handlers if handler not in handlers]
        _of_last_run.extend((logger, handler) for handler in added)
    shorten_screen()


def shorten_screen() -> None:
    """Keep what a user does not want to read off the screen."""
    for name in _LOGGERS:
        for handler in logging.getLogger(name).handlers:
            if getattr(handler, "stream", None) in (sys.stdout, sys.stderr):
                handler.addFilter(is_for_screen)


def is_for_screen(record: logging.LogRecord) -> bool:
    """Warnings and errors, distill_d2's messages, and detectron2's about the progress and results of a run."""
    text = record.getMessage()
    shown = record.levelno >= logging.WARNING or (
        record.levelno >= logging.INFO and _SHOWN.match(f"{record.name}: {text}")
    )
    return bool(shown) and not _HIDDEN.search(text[:200])
