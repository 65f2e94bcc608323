"""The note beside a run's config that says which modules --import brought."""

from __future__ import annotations

import argparse
import logging
import os

from detectron2.utils import comm

from ..plugins import imported, module_name

logger = logging.getLogger(__name__)

NOTE = "imports.txt"


def check_imports(args: argparse.Namespace, folder: str) -> None:
    """Check that a command imports what the run in ``folder`` was started with.

    Raises:
        ValueError: something is missing; the message names it.
    """
    note = os.path.join(folder, NOTE)
    if not folder or not os.path.isfile(note):
        return
    with open(note, encoding="utf-8") as file:
        noted = file.read().splitlines()
    given = {module_name(name) for name in args.imports}
    missing = [name for name in noted if name and module_name(name) not in given]
    if missing:
        options = " ".join(f"--import {name}" for name in missing)
        raise ValueError(
            f"the run in '{folder}' was started with {options}, which this command lacks ({note}); add it, or "
            "remove its line from that file"
        )


def note_imports(args: argparse.Namespace, folder: str) -> None:
    """Log what was imported, and write the note into ``folder``, where the run's config is."""
    for line in imported():
        logger.info(f"Imported {line}")
    if not comm.is_main_process():
        return
    note = os.path.join(folder, NOTE)
    if args.imports:
        names = [os.path.abspath(name) if name.endswith(".py") else name for name in args.imports]
        with open(note, "w", encoding="utf-8") as file:
            file.write("".join(f"{name}\n" for name in names))
    elif os.path.isfile(note):  # of an earlier run, whose config is replaced, too
        os.remove(note)
