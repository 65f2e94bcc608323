"""One page on one or more runs, in a single file that needs no other."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from html import escape

from . import results, sections
from .html import soft
from .models import Cost
from .pictures import Shown, picture_rows
from .roles import Entry
from .style import CSS
from .tables import Table


def page_of(
    entries: Sequence[Entry],
    tables: Sequence[Table],
    title: str,
    *,
    costs: Mapping[str, Cost],
    notes: Sequence[str],
    pictures: Shown | str,
) -> str:
    """The page as HTML, without any request to elsewhere; all texts of runs are escaped.

    Args:
        tables: of all entries.
        costs: by name of an entry, of those whose detector is here.
        notes: on those, and why others are missing.
        pictures: what detectors find in test images; a text: why there are none.

    Raises:
        ValueError: a file of a run holds something else than it should.
    """
    parts = {
        "Results": results.result_tables(entries, tables) + results.gains(entries, tables[0].task),
        "AP over iterations": results.curves(entries, tables),
        "AP per class": results.classes(entries, tables),
        "Size and speed": _costs(entries, costs, notes),
        "Pictures": soft(pictures) if isinstance(pictures, str) else _pictures(pictures),
        "Losses": sections.losses(entries),
        "Gradients": sections.gradients(entries),
        "Settings": sections.settings(entries),
        "Commands": sections.commands(entries),
    }
    links = " ".join(f'<a href="#{_anchor(name)}">{name}</a>' for name in parts)
    made = soft(f"Made by distill-d2 report on {time.strftime('%F %H:%M')}.")
    body = "".join(f'<h2 id="{_anchor(name)}">{name}</h2>{html}' for name, html in parts.items())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><h1>{escape(title)}</h1>"
        f"{made}{results.verdict(entries, tables[0].task)}<nav>{links}</nav>{body}</body></html>\n"
    )


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _costs(entries: Sequence[Entry], costs: Mapping[str, Cost], notes: Sequence[str]) -> str:
    return (results.cost_table(entries, costs) if costs else "") + "".join(map(soft, notes))


def _pictures(shown: Shown) -> str:
    scores = ", ".join(f"{name} {value:.2f}" for name, value in shown.thresholds.items())
    chosen = (
        f"The {len(shown.images)} of {shown.looked_at} test images on which the detectors differ most, whichever "
        "is better. A box is right if it overlaps an object of its class by at least half. Boxes are shown from "
        f"the score that suits each detector best: {scores}."
    )
    kinds = ("right", "wrong", "missed", "truth")
    keys = "".join(f'<span class="key {kind}"></span>{kind}' for kind in kinds)
    return f"{soft(chosen)}<p>{keys}</p>{picture_rows(shown)}"
