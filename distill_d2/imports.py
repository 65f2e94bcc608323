"""Import users' modules, named by --import or by installed packages, and note them beside a run's config.

``distill_d2.plugins`` says what such a module may register.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from importlib import metadata
from types import ModuleType
from typing import Any

GROUP = "distill_d2.plugins"
NOTE = "imports.txt"

_EXPECTED = (
    "Expected a module that can be imported (its folder is in PYTHONPATH, or its package is installed) or the "
    "path of a .py file"
)

# The modules that were imported here, and what named them.
_IMPORTED: dict[str, str] = {}


def add_import_argument(parser: argparse.ArgumentParser) -> None:
    """Add --import, whose values are ``args.imports``, for ``import_modules``."""
    parser.add_argument(
        "--import",
        dest="imports",
        metavar="MODULE_OR_FILE",
        action="append",
        default=[],
        help="a module or .py file of yours that registers losses, detectors, datasets, ...; repeatable",
    )


def import_modules(names: Sequence[str]) -> None:
    """Import what --import names. Call it before a config is read, in every process.

    Args:
        names: of modules, or paths of .py files; a file's folder is added to the end of ``sys.path``.

    Raises:
        ImportError: the message says which one failed, and why.
    """
    for name in names:
        _import(name, f"--import {name}")


def import_entry_points() -> None:
    """Import the modules that installed packages name in the entry point group ``distill_d2.plugins``.

    Raises:
        ImportError: the message says which one failed, and why.
    """
    for point in _entry_points():
        _import(point.value, f"entry point {point.name} of {GROUP}")


def imported() -> list[str]:
    """One line for each imported module: its name, its file, and what named it."""
    return [f"{name} ({sys.modules[name].__file__}; {source})" for name, source in _IMPORTED.items()]


def imported_modules() -> list[str]:
    """Names of the imported modules."""
    return list(_IMPORTED)


def write_note(folder: str, names: Sequence[str]) -> None:
    """Note beside a run's config, in ``folder``, what --import named; an earlier run's note is removed."""
    note = os.path.join(folder, NOTE)
    if names:
        paths = [os.path.abspath(name) if name.endswith(".py") else name for name in names]
        with open(note, "w", encoding="utf-8") as file:
            file.write("".join(f"{path}\n" for path in paths))
    elif os.path.isfile(note):
        os.remove(note)


def check_note(folder: str) -> None:
    """Check that all modules are imported that the note of a run in ``folder`` names, if there is a note.

    Raises:
        ValueError: something is missing; the message names it.
    """
    note = os.path.join(folder, NOTE)
    if not os.path.isfile(note):
        return
    with open(note, encoding="utf-8") as file:
        noted = file.read().splitlines()
    missing = [name for name in noted if name and _module_name(name) not in sys.modules]
    if missing:
        options = " ".join(f"--import {name}" for name in missing)
        raise ValueError(
            f"the run in '{folder}' was started with {options}, which this command lacks. Add it, or remove its "
            f"line from '{note}'"
        )


def _entry_points() -> Iterable[metadata.EntryPoint]:
    points: Any = metadata.entry_points()
    if hasattr(points, "select"):
        return points.select(group=GROUP)
    return points.get(GROUP, ())  # Python 3.9


def _import(name: str, source: str) -> None:
    try:
        module = _import_file(name) if name.endswith(".py") else importlib.import_module(name)
    except Exception as error:  # a user's module may raise anything
        place = _place_in_module(error)
        found = place or isinstance(error, SyntaxError)  # which names its file
        raise ImportError(
            f"{source}: {type(error).__name__}: {error}{place}" + ("" if found else f". {_EXPECTED}")
        ) from error
    _IMPORTED.setdefault(module.__name__, source)


def _place_in_module(error: Exception) -> str:
    """File and line in the module that raised the error, for a message; "" if none of it ran."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [(frame.filename, frame.lineno) for frame in frames if "importlib" not in frame.filename]
    own = [f" ({file}, line {line})" for file, line in places if file != __file__]
    return own[0] if own else ""


def _import_file(path: str) -> ModuleType:
    """Under the file's own name, so that other processes find its classes by it."""
    path, name = os.path.abspath(path), _module_name(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"'{path}' does not exist")
    folder = os.path.dirname(path)
    if folder not in sys.path:
        sys.path.append(folder)
    module = importlib.import_module(name)
    found = getattr(module, "__file__", None)
    if found is None or not os.path.samefile(found, path):
        raise ValueError(f"another module has the name '{name}' ({found}); rename '{path}'")
    return module


def _module_name(name: str) -> str:
    """Of a file its name without the ending."""
    return os.path.splitext(os.path.basename(name))[0] if name.endswith(".py") else name
