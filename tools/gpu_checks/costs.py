"""Time and memory of a distilled step, by the rows of the benchmark."""

from __future__ import annotations

import argparse
import gc
import statistics
from typing import Any

import torch

from distill_d2.benchmark.measure import measure
from distill_d2.benchmark.rows import PART, PREPARED
from distill_d2.benchmark.subjects import DISTILLED, STUDENT
from distill_d2.commands.benchmark import add_arguments

from .report import Report

CONFIGS = {
    "PKD": "Distillation-PKD/retinanet_R_50_R101_pkd_FPN_1x.yaml",
    "ICD": "Distillation-ICD/retinanet_R_50_R101_icd_FPN_1x.yaml",
    "GID": "Distillation-GID/Distill_RetinaNet_T_Res101_S_Res50_2x_L1Smo.yaml",
    "DeFeat": "Distillation-DeFeat/RCNN_R_50_R101_defeat_FPN_1x.yaml",
}
RANDOM_WEIGHTS = ["MODEL.DISTILLER.TEACHER_WEIGHTS", ""]
PRECISIONS = {"float32": ["SOLVER.AMP.ENABLED", "False"], "mixed": ["SOLVER.AMP.ENABLED", "True"]}


def measure_costs(
    report: Report,
    device: str,
    configs: dict[str, str] = CONFIGS,
    size: str = "800x1088",
    rounds: int = 10,
    warmup: int = 3,
) -> None:
    """Two images per step; a row of ``report.costs`` per config and precision."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for precision, opts in PRECISIONS.items():
        for name, config in configs.items():
            options = {"size": size, "rounds": rounds, "warmup": warmup, "device": device}
            words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
            words += ["--config-file", config, *RANDOM_WEIGHTS, *opts]

            def check(words=words, name=name, precision=precision) -> None:
                report.costs.append(row_of(measure(parser.parse_args(words)), name, precision))
                gc.collect()
                torch.cuda.empty_cache()  # nothing without a GPU

            report.run("costs", f"{name}, {precision}", check)


def row_of(measured: dict[str, Any], name: str, precision: str) -> dict[str, Any]:
    """The medians of one measurement, by column of the table."""
    rows, clock = measured["rows"], f"{measured['clock']}_ms"
    time = {row: statistics.median(values[clock]) for row, values in rows.items()}
    ratio = measured["ratios"][f"{DISTILLED} / ({STUDENT} + {PART})"]
    alone = sum(value for row, value in time.items() if row.endswith(" alone"))
    return {
        "method": name,
        "precision": precision,
        "ratio": round(statistics.median(ratio), 3),
        "least": round(min(ratio), 3),
        "most": round(max(ratio), 3),
        "student ms": round(time[STUDENT], 2),
        "teacher ms": round(time[PART], 2),
        "prepared ms": round(time[PREPARED], 2),
        "distilled ms": round(time[DISTILLED], 2),
        "loss ms": round(alone, 2),
        "student MB": round(rows[STUDENT]["peak_mb"]),
        "distilled MB": round(rows[DISTILLED]["peak_mb"]),
    }
