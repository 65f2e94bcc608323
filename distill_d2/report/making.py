"""From runs to the file of a page."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence

from ..checkpoint import write_whole
from ..engine.output_dir import check_writable
from ..inference import Trained
from ..inference.images import read_bgr
from ..inference.truth import Truth, truth_of_tests
from .kinds import kinds_of
from .models import costs_of, load_models
from .page import page_of
from .pictures import Shown, images_to_show
from .roles import TEACHER, Entry, entries_of
from .tables import tables_of


def make_report(
    runs: Sequence[str],
    output: str,
    *,
    teachers: Sequence[str] = (),
    alone: Sequence[str] = (),
    title: str = "",
    show: int = 6,
    look_at: int = 60,
    device: str = "cpu",
) -> None:
    """Write the page about runs; it prints what it does.

    Args:
        runs, teachers, alone: as ``kinds_of`` and ``entries_of`` take them.
        output: the file.
        show, look_at: test images in the page, and among which they are chosen; 0: no pictures.

    Raises:
        OSError, ValueError: a run or an argument is wrong; the message says what was expected.
    """
    if not (runs or teachers or alone):
        raise ValueError(
            "no RUN is given; expected the OUTPUT_DIR of at least one training or evaluation"
        )
    if os.path.isdir(output):
        raise ValueError(f"--output '{output}' is a folder; expected a file, such as report.html")
    if show < 0 or look_at < 0:
        raise ValueError(f"--pictures {show} --images {look_at}: expected 0 or more")
    check_writable(os.path.dirname(output) or ".", "--output: the folder")
    entries = _entries(runs, teachers, alone)
    print(", ".join(f"{entry.name}: {entry.role}" for entry in entries), flush=True)
    tables = tables_of([entry.kind for entry in entries])  # before what takes long: it may raise
    models, notes = load_models(entries, device)
    pictures = _pictures(entries, models, show, look_at)
    shown = [] if isinstance(pictures, str) else pictures.images
    print("measuring the time per image", flush=True)
    costs = costs_of(models, [read_bgr(image.record["file_name"]) for image in shown])
    title = title or f"Report on {', '.join(entry.name for entry in entries)}"
    page = page_of(entries, tables, title, costs=costs, notes=notes, pictures=pictures)
    write_whole(output, lambda file: file.write(page.encode()))
    print(f"{output}: {len(page) // 1000} KB")


def _entries(runs: Sequence[str], teachers: Sequence[str], alone: Sequence[str]) -> list[Entry]:
    """A run with a given role may stand among the others, too."""
    others = [run for run in runs if run not in (*teachers, *alone)]
    kinds = iter(kinds_of([*others, *teachers, *alone]))
    return entries_of(*(list(itertools.islice(kinds, len(part))) for part in (others, teachers, alone)))


def _pictures(
    entries: Sequence[Entry], models: Mapping[str, Trained], show: int, look_at: int
) -> Shown | str:
    """What the detectors find in test images; a text that says why there are no pictures."""
    if not (show and look_at):
        return "No pictures were asked for."
    if not models:
        return "There are no pictures: no detector could be loaded."
    data = _test_data(entries, models)
    if data is None:
        return "There are no pictures: the data of DATASETS.TEST are not here."
    print(f"looking at {min(look_at, len(data.records))} of {len(data.records)} test images", flush=True)
    students = [entry.name for entry in entries if entry.name in models and entry.role != TEACHER]
    try:
        return images_to_show(models, data, students or list(models), look_at, show)
    except ValueError as error:
        return f"There are no pictures: {error}"


def _test_data(entries: Sequence[Entry], models: Mapping[str, Trained]) -> Truth | None:
    """The test images of a student, or else of a teacher; None where they are not here."""
    for entry in sorted(entries, key=lambda entry: entry.role == TEACHER):
        data = truth_of_tests(models[entry.name]) if entry.name in models else None
        if data and data.records:
            return data
    return None
