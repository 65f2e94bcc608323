"""What a run notes in its OUTPUT_DIR for later readers: its command line, and evaluations outside of training."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Mapping
from numbers import Real
from typing import Any

from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from ..checkpoint import append_whole
from ..run_files import COMMANDS, EVALUATIONS


def note_command(folder: str) -> None:
    """Append the command line of this process, with its time and folder, to COMMANDS.

    Raises:
        OSError: the file cannot be written.
    """
    if not comm.is_main_process():
        return
    text = f"# {time.strftime('%F %T')}, in {os.getcwd()}\n{command_line()}\n"
    append_whole(os.path.join(folder, COMMANDS), text.encode(errors="replace"))


def command_line() -> str:
    """The command that started this process, as a shell reads it."""
    program, *arguments = sys.argv
    name = os.path.basename(program)
    words = [name]
    if name == "__main__.py":
        words = ["python", "-m", os.path.basename(os.path.dirname(program))]
    elif name.endswith(".py"):
        words = ["python", program]
    return shlex.join([*words, *arguments])


def note_evaluation(folder: str, results: Mapping[str, Any], weights: str) -> None:
    """Append the results of an evaluation to EVALUATIONS: a line like one of metrics.json, with the time and the
    weights.

    Args:
        results: as an evaluator returns them, {task: {metric: value}}, or by dataset where there are several;
            empty on all but the main process. What is no number is left out.

    Raises:
        OSError: the file cannot be written.
    """
    if not comm.is_main_process():
        return
    flat = flatten_results_dict(results)
    numbers = {name: float(value) for name, value in flat.items() if isinstance(value, Real)}
    if not numbers:
        return
    entry = {"time": time.strftime("%F %T"), "weights": weights, **numbers}
    append_whole(os.path.join(folder, EVALUATIONS), f"{json.dumps(entry)}\n".encode())
