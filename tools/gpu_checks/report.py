"""Checks with results: each one is independent, and a failure does not stop the others."""

from __future__ import annotations

import json
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Callable

import torch
from tabulate import tabulate

PASS, FAIL, SKIPPED = "pass", "FAIL", "skipped"


@dataclass
class Result:
    """The result of one check.

    Attributes:
        group: checks of one group are counted in one row of the table.
        name: of the check within its group.
        status: "pass", "FAIL" or "skipped".
        message: what was measured, or what went wrong.
        trace: where it went wrong.
    """

    group: str
    name: str
    status: str
    seconds: float = 0.0
    message: str = ""
    trace: str = ""


def use_exact_float32() -> None:
    """TF32, which torch allows in convolutions, would hide differences."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def run_check(group: str, name: str, check: Callable[[], str | None]) -> Result:
    """Run one check; what it returns is the result's message, and any exception a failure."""
    start, message, trace, status = time.monotonic(), "", "", PASS
    try:
        message = check() or ""
    except Exception as error:
        status, trace = FAIL, traceback.format_exc()
        message = f"{type(error).__name__}: {error}"
    return Result(group, name, status, time.monotonic() - start, message, trace)


@dataclass
class Report:
    """All results, in the order in which they came.

    Attributes:
        facts: what the numbers depend on.
        costs: rows of the table of costs.
        seconds: how long everything may take; checks that would start later are skipped.
    """

    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    costs: list[dict[str, Any]] = field(default_factory=list)
    start: float = field(default_factory=time.monotonic)

    @property
    def time_left(self) -> float:
        return self.start + self.seconds - time.monotonic()

    def run(self, group: str, name: str, check: Callable[[], str | None]) -> None:
        if self.time_left <= 0:
            self.results.append(Result(group, name, SKIPPED, message="no time left"))
        else:
            self.results.append(run_check(group, name, check))

    def failures(self) -> list[Result]:
        return [result for result in self.results if result.status == FAIL]

    def table(self) -> str:
        """A row per group, then one per failure, then the costs."""
        groups = list(dict.fromkeys(result.group for result in self.results))
        rows = [_summary(group, [r for r in self.results if r.group == group]) for group in groups]
        parts = [tabulate(rows, headers=["checks", PASS, FAIL, SKIPPED, "s"], tablefmt="pipe")]
        failed = [[r.group, r.name, r.message.strip().split("\n")[0][:200]] for r in self.failures()]
        if failed:
            headers = ["failed", "where", "message"]
            parts.append(tabulate(failed, headers=headers, tablefmt="pipe", disable_numparse=True))
        notes = [[r.group, r.name, r.message] for r in self.results if r.status == PASS and r.message]
        if notes:
            headers = ["measured", "where", "value"]
            parts.append(tabulate(notes, headers=headers, tablefmt="pipe", disable_numparse=True))
        if self.costs:
            parts.append(tabulate(self.costs, headers="keys", tablefmt="pipe"))
        return "\n\n".join(parts)

    def write(self, path: str) -> None:
        data = {
            "facts": self.facts,
            "seconds": time.monotonic() - self.start,
            "costs": self.costs,
            "results": [asdict(result) for result in self.results],
        }
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(data, indent=1) + "\n")


def _summary(group: str, results: Iterable[Result]) -> list[Any]:
    results = list(results)
    counts = Counter(result.status for result in results)
    seconds = round(sum(result.seconds for result in results), 1)
    return [group, counts[PASS], counts[FAIL], counts[SKIPPED], seconds]
