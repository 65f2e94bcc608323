#!/usr/bin/env python
"""Check every loss and every kind of detector on one GPU, and measure what distillation costs there.

    tools/test_gpu.py                         # all, in at most 8 minutes
    tools/test_gpu.py --json output/gpu.json  # where the results are written, too
    tools/test_gpu.py --only runs teachers    # some of: costs, teachers, runs, cells

Needs a torch with its torchvision (tried: Python 3.12, torch 2.11) for the GPU's driver; if other packages are
missing, it says how to bring them. Downloads nothing. Without a GPU it says so, claims nothing, and exits with 0.

    costs     the benchmark's rows for PKD, ICD, GID, DeFeat at 2 images of 800x1088: time between CUDA
              events, peak memory; "ratio" is distilled step / (student step + plain teacher)
    teachers  the prepared teacher gives the outputs of the plain one: float32, bfloat16, float16
    runs      whole trainings: mixed precision, pinned loaders with workers, resume, DDP over NCCL
    cells     for every loss and kind of detector: the laws' suite, no waiting in the teacher's pass, the
              loss and its backward pass (torch.cuda.set_sync_debug_mode("error")), finite losses and
              gradients under float16 and bfloat16 autocast

Each check is independent. The exit code is 1 if any failed; those for which there was no time left are
counted as skipped.
"""

from __future__ import annotations

import argparse
import logging
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package need not be installed

from gpu_checks.packages import advice, missing_packages

PARTS = ("costs", "teachers", "runs", "cells")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    args = parse_arguments(arguments)
    missing = missing_packages()
    if "torch" not in missing and args.device == "cuda" and not has_gpu():
        print("test_gpu: torch sees no GPU here; nothing was checked")
        return 0
    if missing:
        print(advice(missing))
        return 1
    logging.disable(logging.WARNING)
    try:
        report = run(args)
    finally:
        logging.disable(logging.NOTSET)
    print(report.table())
    if args.json:
        report.write(args.json)
    failures = len(report.failures())
    print(f"test_gpu: {failures} of {len(report.results)} checks failed on {report.facts['device']}")
    return 1 if failures else 0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", default="output/test_gpu.json", help="file of all results")
    parser.add_argument("--minutes", type=float, default=8.0, help="checks that start later are skipped")
    parser.add_argument("--workers", type=int, default=4, help="processes that check cells side by side")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--device", default="cuda", help="cpu: to try the program itself")
    return parser.parse_args(arguments)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def run(args: argparse.Namespace) -> Any:
    """All parts, a Report; what is timed runs alone, the cells last, as long as there is time."""
    import distill_d2  # noqa: F401  first: it silences known warnings of detectron2

    from gpu_checks.cells import cell_names, check_cells  # isort: skip
    from gpu_checks.costs import measure_costs  # isort: skip
    from gpu_checks.report import Report  # isort: skip
    from gpu_checks.runs import check_runs  # isort: skip
    from gpu_checks.teachers import check_teachers  # isort: skip

    report = Report(seconds=60 * args.minutes - 15, facts=facts(args.device))
    if "costs" in args.only:
        measure_costs(report, args.device)
    if "teachers" in args.only:
        check_teachers(report, args.device)
    if "runs" in args.only:
        check_runs(report, args.device)
    if "cells" in args.only:
        check_cells(report, cell_names(), args.device, args.workers)
    return report


def facts(device: str) -> dict[str, Any]:
    import torch
    import torchvision

    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return {
        "device": name,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
    }


if __name__ == "__main__":
    sys.exit(main())
