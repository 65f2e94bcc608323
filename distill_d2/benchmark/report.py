"""Ratios and tables of the measurements."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from tabulate import tabulate

from .meter import Meter, Sample
from .rows import CACHED, PART, PREPARED, WHOLE
from .subjects import DISTILLED, STUDENT

TIMES = ("wall", "process", "event")


def summarize(
    rounds: dict[str, list[Sample]],
    memory: dict[str, float],
    clock: str,
    compared: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    """All measurements in milliseconds and megabytes, and the ratios of each round, also of the rows
    ``compared``."""
    times = {name: [getattr(s, clock) for s in samples] for name, samples in rounds.items()}
    floor = [a + b for a, b in zip(times[STUDENT], times[PART])]
    whole = [a + b for a, b in zip(times[STUDENT], times[WHOLE])]
    ratios = {
        f"{DISTILLED} / ({STUDENT} + {PART})": paired(times[DISTILLED], floor),
        f"{DISTILLED} / ({STUDENT} + {WHOLE})": paired(times[DISTILLED], whole),
        f"{DISTILLED} / {STUDENT}": paired(times[DISTILLED], times[STUDENT]),
        f"{CACHED} / {STUDENT}": paired(times[CACHED], times[STUDENT]),
        f"{PREPARED} / {PART}": paired(times[PREPARED], times[PART]),
    }
    for above, below in compared:
        ratios[f"{above} / {below}"] = paired(times[above], times[below])
    rows = {
        name: {
            **{f"{t}_ms": [1000 * getattr(s, t) for s in samples] for t in shown_times(clock)},
            "peak_mb": memory[name],
        }
        for name, samples in rounds.items()
    }
    # Very small tasks take no memory that the system would notice.
    memory_ratios = {
        f"{above} / {below}": memory[above] / memory[below] if memory[below] else None
        for above, below in compared
    }
    return {"clock": clock, "rows": rows, "ratios": ratios, "memory_ratios": memory_ratios}


def shown_times(clock: str) -> tuple[str, ...]:
    """Which times are reported: those of events only where ratios are of them."""
    return TIMES if clock == "event" else TIMES[:2]


def paired(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below)]


def facts(args: Any, size: tuple[int, int], cfg: CfgNode, meter: Meter) -> dict[str, Any]:
    """What the numbers depend on."""
    node, (height, width) = cfg.MODEL.DISTILLER, size
    return {
        "config": " ".join([args.config_file, *args.opts]),
        "teacher": f"{node.MODEL_DISTILLER_CONFIG}, "
        + ("prepared" if node.TEACHER_PREPARE else "not prepared")
        + f", autocast {node.TEACHER_AUTOCAST or 'float32'}"
        + (", compiled" if node.TEACHER_COMPILE else ""),
        "losses": ", ".join(node.TYPES),
        "batch": f"{args.batch} images of {height}x{width}, {args.objects} objects each",
        "rounds": args.rounds,
        "device": torch.cuda.get_device_name(meter.device) if meter.on_gpu else "cpu",
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "memory": meter.memory_note,
    }


def processor() -> str:
    try:
        lines: Iterable[str] = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def print_report(report: dict[str, Any]) -> None:
    for name, value in report["facts"].items():
        print(f"{name + ':':<11}{value}")
    times = shown_times(report["clock"])
    rows = [
        [name, *(spread(row[f"{t}_ms"], 1) for t in times), f"{row['peak_mb']:.0f}"]
        for name, row in report["rows"].items()
    ]
    header = ["median [min max]", *(f"{t} ms" for t in times), "memory MB"]
    print("\n" + tabulate(rows, headers=header, tablefmt="pipe", disable_numparse=True))
    ratios = [[name, spread(values, 3)] for name, values in report["ratios"].items()]
    header = [f"ratio in each round, of {report['clock']} time", "median [min max]"]
    print("\n" + tabulate(ratios, headers=header, tablefmt="pipe", disable_numparse=True))
    if not report["memory_ratios"]:
        return
    ratios = [
        [name, "-" if ratio is None else f"{ratio:.3f}"]
        for name, ratio in report["memory_ratios"].items()
    ]
    header = ["ratio of memory", "once"]
    print("\n" + tabulate(ratios, headers=header, tablefmt="pipe", disable_numparse=True))


def spread(values: list[float], digits: int) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} [{low:.{digits}f} {high:.{digits}f}]"
