"""Pieces of HTML; texts are escaped where they become HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table that scrolls where the screen is narrow.

    Args:
        header: texts.
        rows: cells as HTML.
        kind: a class of the style; "left" aligns all columns to the left.
    """
    head = "".join(f"<th>{escape(text)}</th>" for text in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    content = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="{kind}">{content}</table></div>'


def named(name: str, color: int) -> str:
    """A name behind its color."""
    return f'<span class="swatch c{color}"></span>{escape(name)}'


def signed(value: float, text: str) -> str:
    """A difference, green or red."""
    return f'<span class="{"up" if value > 0 else "down" if value < 0 else ""}">{escape(text)}</span>'


def folded(title: str, html: str) -> str:
    """Shown on a click."""
    return f"<details><summary>{escape(title)}</summary>{html}</details>"


def soft(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'
