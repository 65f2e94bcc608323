#!/usr/bin/env python
"""The whole job on generated data: train a teacher, then a student alone and the same student
distilled, side by side, and print them.

    tools/demo.py [--seed 1] [--methods pkd mimic icd gid] [--output output/demo] [--num-gpus 1]

The methods gid-feature, gid-relation and gid-response are single parts of GID, defeat-neck is DeFeat
without the head's classes; bccd_rcnn is BCCD with Faster R-CNN, shapes_ssd and bccd_ssd are SSD (methods
ssdkd and ssdkd-repository), bccd_fcos and nuclei_solov2 FCOS and SOLOv2 (icd), the others have RetinaNet.
Takes minutes on two CPU cores. Everything it runs is an ordinary command line, printed first; each
run's log, checkpoints and metrics are in OUTPUT/teacher, OUTPUT/student and OUTPUT/<method>.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]


def _off(*weights: str) -> list[str]:
    """Options that switch terms of losses off, by the keys of their weights."""
    return [word for key in weights for word in (f"MODEL.DISTILLER.{key}", "0.0")]


def _gid_without(*terms: str) -> list[str]:
    return _off(*(f"GID.{term}_WEIGHT" for term in terms))


# What the repository SSD-Knowledge-Distillation computes.
SSDKD_OF_REPOSITORY = "MODEL.DISTILLER.SSD_KD.BOUNDED batch MODEL.DISTILLER.SSD_KD.HINT logits".split()
# By name of a run: its script, its config in configs/quickstart/ after the dataset's name, and options.
RUNS = {
    "teacher": ("train_baseline.py", "teacher", []),
    "student": ("train_baseline.py", "student", []),
    "pkd": ("train_distill.py", "distill", []),
    "mimic": ("train_distill.py", "distill", ["MODEL.DISTILLER.TYPES", "['FeatureMimic']"]),
    "icd": ("train_distill.py", "icd", []),
    "fgfi": ("train_distill.py", "fgfi", []),
    "headkd": ("train_distill.py", "headkd", []),
    "defeat": ("train_distill.py", "defeat", []),
    "defeat-neck": ("train_distill.py", "defeat", _off("DEFEAT.HEAD_CLS_W", "DEFEAT.HEAD_CLS_BACK_W")),
    "ssdkd": ("train_distill.py", "ssdkd", []),
    "ssdkd-repository": ("train_distill.py", "ssdkd", SSDKD_OF_REPOSITORY),
    "gid": ("train_distill.py", "gid", []),
    "gid-feature": ("train_distill.py", "gid", _gid_without("RELATION", "RESPONSE_CLS", "RESPONSE_REG")),
    "gid-relation": ("train_distill.py", "gid", _gid_without("FEATURE", "RESPONSE_CLS", "RESPONSE_REG")),
    "gid-response": ("train_distill.py", "gid", _gid_without("FEATURE", "RELATION")),
}
METHODS = list(RUNS)[2:]
DATASETS = ["shapes", "bccd", "bccd_rcnn", "shapes_ssd", "bccd_ssd", "bccd_fcos", "nuclei_solov2"]
SECONDS_BETWEEN_NEWS = 30


def main() -> None:
    args = parse_arguments()
    started = time.time()
    output = Path(args.output)
    wait_for([start("teacher", args)])
    others = ["student", *args.methods]
    for index in range(0, len(others), 2):  # two at a time
        wait_for([start(name, args) for name in others[index : index + 2]])
    print_comparison(output, args.methods, time.time() - started)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", choices=DATASETS, default="shapes")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS[:1])
    parser.add_argument("--seed", type=int, default=1, help="of all runs")
    parser.add_argument("--output", default="output/demo", help="folder for the runs")
    parser.add_argument("--num-gpus", type=int, default=0)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for all runs")
    args = parser.parse_args()
    if Path(args.output).is_file():
        parser.error(f"--output {args.output}: a file; expected a folder")
    for method in args.methods:
        config = ROOT / "configs" / config_of(method, args.dataset)
        if not config.is_file():
            parser.error(f"--methods {method}: there is no {config} for --dataset {args.dataset}")
    return args


def config_of(name: str, dataset: str) -> str:
    """The packaged config of a run."""
    return f"quickstart/{dataset}_{RUNS[name][1]}.yaml"


def start(name: str, args: argparse.Namespace) -> subprocess.Popen:
    """Start one training; its output goes to OUTPUT/<name>.out."""
    script, _, options = RUNS[name]
    output = Path(args.output)
    command = [sys.executable, str(ROOT / script), "--num-gpus", str(args.num_gpus)]
    command += ["--overwrite", "--config-file", config_of(name, args.dataset), *options, *args.opts]
    command += ["SEED", str(args.seed), "OUTPUT_DIR", str(output / name)]
    if name in METHODS:
        command += ["MODEL.DISTILLER.TEACHER_WEIGHTS", str(output / "teacher" / "model_final.pth")]
    output.mkdir(parents=True, exist_ok=True)
    print(f"$ {shlex.join(command)}", flush=True)
    log = open(output / f"{name}.out", "w")
    # One thread per process: two runs share a machine without slowing each other down.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    process.log_file = log.name
    return process


def wait_for(processes: list[subprocess.Popen]) -> None:
    """Wait for all; on a failure, or Ctrl-C, stop the others and leave."""
    shown = time.time()
    try:
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                break
            if time.time() - shown > SECONDS_BETWEEN_NEWS:
                shown = time.time()
                print("  " + "; ".join(progress(process) for process in processes), flush=True)
            time.sleep(0.5)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
    failed = [process for process in processes if process.wait()]
    if failed:
        tail = Path(failed[0].log_file).read_text().splitlines()[-20:]
        sys.exit("\n".join(tail) + f"\nfailed; the whole output is in {failed[0].log_file}")


def progress(process: subprocess.Popen) -> str:
    """Where a run is: the last line of its log that tells an iteration."""
    lines = Path(process.log_file).read_text(errors="replace").splitlines()
    told = [line.partition("iter: ")[2].split() for line in lines if "iter: " in line]
    where = f"iteration {told[-1][0]}" if told else "starting"
    return f"{Path(process.log_file).stem}: {where}"


def print_comparison(output: Path, methods: list[str], seconds: float) -> None:
    found = {name: last_results(output / name) for name in ("teacher", "student", *methods)}
    task = "segm" if "segm/AP" in found["student"] else "bbox"
    scores = [f"{task}/{score}" for score in ("AP", "AP50", "AP75")]
    rows = [[name, *(results[score] for score in scores)] for name, results in found.items()]
    header = ["", *scores]
    print(tabulate(rows, headers=header, tablefmt="pipe", floatfmt=".1f"))
    gains = [found[name][scores[0]] - found["student"][scores[0]] for name in methods]
    gains = ", ".join(f"{name} - student: {gain:+.1f} AP" for name, gain in zip(methods, gains))
    print(f"{gains}; {seconds / 60:.1f} minutes in all")


def last_results(run: Path) -> dict[str, float]:
    """The last evaluation in a run's metrics.json."""
    lines = [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]
    return [line for line in lines if "bbox/AP" in line][-1]


if __name__ == "__main__":
    main()
