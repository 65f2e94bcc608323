"""Text files of other systems: byte order marks, UTF-16, lines that end in CR LF."""

from __future__ import annotations

import codecs

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(file: str) -> str:
    """The content of a text file in UTF-8 or UTF-16, without its byte order mark.

    Raises:
        ValueError: it is neither.
        OSError: it cannot be read.
    """
    with open(file, "rb") as stream:
        content = stream.read()
    try:
        return content.decode(_encoding(content))
    except UnicodeDecodeError as error:
        raise ValueError(f"'{file}' is not text in UTF-8 or UTF-16: {error}") from error


def _encoding(content: bytes) -> str:
    for mark, encoding in _MARKS:
        if content.startswith(mark):
            return encoding
    if b"\0" in content[:2]:  # a letter and a zero, or a zero and a letter
        return "utf-16-be" if content[:1] == b"\0" else "utf-16-le"
    return "utf-8"


def read_lines(file: str) -> list[str]:
    """Its lines without the spaces around them, and without empty lines. Raises as ``read_text``."""
    return [line.strip() for line in read_text(file).splitlines() if line.strip()]
