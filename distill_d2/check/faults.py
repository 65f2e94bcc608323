"""All that is wrong, as far as one fault does not hide another."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Iterator

from ..engine.run_log import is_for_screen
from ..mistakes import is_mistake, message_of

# The first line of a message that has a line for each fault.
_SEVERAL = r"(.*: )?\d+ (values cannot be used|keys of the config are wrong):"


class Faults:
    """Messages about a user's mistakes.

    Attributes:
        messages: each one once, in the order in which they were found.
    """

    def __init__(self) -> None:
        self.messages: list[str] = []

    def __bool__(self) -> bool:
        return bool(self.messages)

    def add(self, error: Exception) -> None:
        text = message_of(error)
        head, _, lines = text.partition("\n")
        for each in lines.split("\n") if re.fullmatch(_SEVERAL, head) else [text]:
            value, _, _ = each.partition("; expected")  # several parts look at a value
            if not any(value in known for known in self.messages):
                self.messages.append(each)

    @contextlib.contextmanager
    def collected(self) -> Iterator[None]:
        """A mistake inside ends the block, and is noted. Other errors pass, unless they may follow from one."""
        try:
            yield
        except Exception as error:
            if is_mistake(error):
                self.add(error)
            elif not self:
                raise


class _Notes(logging.Handler):
    def __init__(self, notes: list[str]):
        super().__init__(logging.WARNING)
        self.addFilter(is_for_screen)
        self._notes = notes

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self._notes:
            self._notes.append(text)


@contextlib.contextmanager
def noted(notes: list[str]) -> Iterator[None]:
    """Inside, nothing is printed or logged; the warnings of this package and of detectron2 are added to the notes,
    each one once."""
    loggers = [logging.getLogger(name) for name in ("distill_d2", "detectron2", "fvcore")]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [_Notes(notes)], False
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, before):
            logger.handlers, logger.propagate = handlers, propagate
