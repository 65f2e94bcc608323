"""Values in messages."""

from __future__ import annotations

from typing import Any


def shortened(value: Any, most: int = 80) -> str:
    """A value as text, cut where it is too long for a message."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
