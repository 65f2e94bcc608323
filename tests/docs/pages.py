"""The blocks of a page, and a shell that hands the commands of a bash block to a test instead of running them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from runs import ROOT

#: Commands that pages may have.
PROGRAMS = [
    "distill-d2",
    "python",
    "pip",
    "make",
    "mkdocs",
    "torchrun",
    "srun",
    "docker",
    "git",
    "datasets",
    "export",
]
PAGES = [
    "README.md",
    "datasets/README.md",
    *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md")),
]

_BLOCK = re.compile(r"^```(\w*)(?: +title=\"([^\"]*)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file that it stands for ("": none), and its text."""

    language: str
    file: str
    text: str


def blocks(page: str) -> Iterator[Block]:
    for found in _BLOCK.finditer((ROOT / page).read_text(encoding="utf-8")):
        yield Block(found[1], found[2] or "", found[3])


def run_bash(text: str, folder: Path, run: Callable[[list[str]], int]) -> None:
    """Run a bash block in ``folder``. Each command of PROGRAMS is given to ``run``, which returns its status;
    other commands, and a status other than 0, fail."""
    asked, ask = os.pipe()
    answers, answer = os.pipe()
    functions = [f'{name}() {{ _ask {name} "$@"; }}' for name in PROGRAMS]
    script = [
        "set -euo pipefail",
        f"_ask() {{ printf '%q ' \"$@\" >&{ask}; echo >&{ask}; read -r _status <&{answers}; return $_status; }}",
        *functions,
        # A path cannot be the name of a function.
        re.sub(r"^datasets/", "datasets ", text, flags=re.MULTILINE),
    ]
    words = ["bash", "-c", "\n".join(script)]
    bash = subprocess.Popen(
        words, cwd=folder, pass_fds=[ask, answers], stderr=subprocess.PIPE, text=True
    )
    os.close(ask)
    os.close(answers)
    with os.fdopen(asked) as requests, os.fdopen(answer, "w") as replies:
        for line in requests:
            print(run(shlex.split(line)), file=replies, flush=True)
    errors = bash.communicate()[1]
    assert bash.returncode == 0, f"{errors}\n{text}"


def option(words: Sequence[str], name: str) -> str | None:
    """The value of an option, or of a config key."""
    joined = [word.partition("=")[2] for word in words if word.startswith(f"{name}=")]
    return words[words.index(name) + 1] if name in words else next(iter(joined), None)
