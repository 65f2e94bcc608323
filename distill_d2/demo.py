"""The whole job on small data: the work of ``distill-d2 demo``."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from .mistakes import EXIT_STATUS


def _off(*weights: str) -> list[str]:
    """Options that switch terms of losses off, by the keys of their weights."""
    return [word for key in weights for word in (f"MODEL.DISTILLER.{key}", "0.0")]


def _gid_without(*terms: str) -> list[str]:
    return _off(*(f"GID.{term}_WEIGHT" for term in terms))


# What the repository SSD-Knowledge-Distillation computes.
SSDKD_OF_REPOSITORY = "MODEL.DISTILLER.SSD_KD.BOUNDED batch MODEL.DISTILLER.SSD_KD.HINT logits".split()
# By name of a run: its command, its config in configs/quickstart/ after the dataset's name, and options.
RUNS = {
    "teacher": ("baseline", "teacher", []),
    "student": ("baseline", "student", []),
    "pkd": ("train", "distill", []),
    "mimic": ("train", "distill", ["MODEL.DISTILLER.TYPES", "['FeatureMimic']"]),
    "icd": ("train", "icd", []),
    "fgfi": ("train", "fgfi", []),
    "headkd": ("train", "headkd", []),
    "defeat": ("train", "defeat", []),
    "defeat-neck": ("train", "defeat", _off("DEFEAT.HEAD_CLS_W", "DEFEAT.HEAD_CLS_BACK_W")),
    "ssdkd": ("train", "ssdkd", []),
    "ssdkd-repository": ("train", "ssdkd", SSDKD_OF_REPOSITORY),
    "gid": ("train", "gid", []),
    "gid-feature": ("train", "gid", _gid_without("RELATION", "RESPONSE_CLS", "RESPONSE_REG")),
    "gid-relation": ("train", "gid", _gid_without("FEATURE", "RESPONSE_CLS", "RESPONSE_REG")),
    "gid-response": ("train", "gid", _gid_without("FEATURE", "RELATION")),
}
METHODS = list(RUNS)[2:]
DATASETS = ["shapes", "bccd", "bccd_rcnn", "shapes_ssd", "bccd_ssd", "bccd_fcos", "nuclei_solov2"]
SECONDS_BETWEEN_NEWS = 30
IMAGES_TIMED = 8


def demo(args: argparse.Namespace) -> None:
    """Train everything, and print it.

    Args:
        args: of ``distill-d2 demo``.

    Raises:
        OSError, ValueError: an argument is wrong.
        SystemExit: a training failed, with its status; the end of its output was printed.
    """
    check(args)
    started = time.time()
    wait_for([start("teacher", args)])
    others = ["student", *args.methods]
    for index in range(0, len(others), 2):  # two at a time
        wait_for([start(name, args) for name in others[index : index + 2]])
    device = "cuda" if args.num_gpus else "cpu"
    print_comparison(Path(args.output), args.methods, time.time() - started, device)


def check(args: argparse.Namespace) -> None:
    """Make the folder of the runs. Raises OSError or ValueError for arguments that cannot be right."""
    from .model_zoo import available_configs

    for method in args.methods:
        config = config_of(method, args.dataset)
        if config not in available_configs():
            raise ValueError(f"--methods {method}: there is no {config} for --dataset {args.dataset}")
    try:
        os.makedirs(args.output, exist_ok=True)
    except OSError as error:
        raise OSError(f"--output {args.output}: this folder cannot be made: {error}") from error


def config_of(name: str, dataset: str) -> str:
    """The packaged config of a run."""
    return f"quickstart/{dataset}_{RUNS[name][1]}.yaml"


@dataclass
class Run:
    """A running training, and the file of its output."""

    process: subprocess.Popen
    output: Path

    def lines(self) -> list[str]:
        return self.output.read_text(errors="replace").splitlines()


def start(name: str, args: argparse.Namespace) -> Run:
    """Start one training; its output goes to OUTPUT/<name>.out."""
    command_name, _, options = RUNS[name]
    folder = Path(args.output)
    command = [command_name, "--num-gpus", str(args.num_gpus)]
    command += ["--overwrite", "--config-file", config_of(name, args.dataset), *options, *args.opts]
    command += ["SEED", str(args.seed), "OUTPUT_DIR", str(folder / name)]
    if name in METHODS:
        command += ["MODEL.DISTILLER.TEACHER_WEIGHTS", str(folder / "teacher" / "model_final.pth")]
    print(f"$ distill-d2 {shlex.join(command)}", flush=True)
    output = folder / f"{name}.out"
    with open(output, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "distill_d2", *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=child_environment(),
        )
    return Run(process, output)


def child_environment() -> dict[str, str]:
    """For a process with this package, wherever it lies. One thread per process: two runs share a machine
    without slowing each other down."""
    path = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    return {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def wait_for(runs: list[Run]) -> None:
    """Wait for all; on a failure, or Ctrl-C, stop the others and leave."""
    shown = time.time()
    try:
        while True:
            running = [run for run in runs if run.process.poll() is None]
            failed = [run for run in runs if run.process.poll()]
            if failed or not running:
                break
            if time.time() - shown > SECONDS_BETWEEN_NEWS:
                shown = time.time()
                print("  " + "; ".join(map(progress, runs)), flush=True)
            time.sleep(0.5)
    finally:
        for run in runs:
            if run.process.poll() is None:
                run.process.terminate()
                run.process.wait()
    if failed:
        stop(failed[0])


def stop(run: Run) -> NoReturn:
    """End with a failed run's status, after the end of its output; of a mistake, status 2, after its message."""
    lines, status = run.lines(), run.process.returncode
    first = max(0, len(lines) - 20)
    if status == EXIT_STATUS:
        first = max([i for i, line in enumerate(lines) if line.startswith("distill-d2 ")], default=first)
    print("\n".join(lines[first:]), file=sys.stderr)
    print(f"failed; the whole output is in {run.output}", file=sys.stderr)
    sys.exit(max(status, 1))  # a signal's is negative


def progress(run: Run) -> str:
    """Where a run is: the last line of its log that tells an iteration."""
    told = [line.partition("iter: ")[2].split() for line in run.lines() if "iter: " in line]
    where = f"iteration {told[-1][0]}" if told else "starting"
    return f"{run.output.stem}: {where}"


def print_comparison(output: Path, methods: list[str], seconds: float, device: str = "cpu") -> None:
    """Sizes, speeds and APs of all runs, and what the student gained; then what to do next.

    Args:
        seconds: that the runs took.
        device: of torch, on which speeds are measured.
    """
    from tabulate import tabulate

    from .profiling import time_ratio

    names = ["teacher", "student", *methods]
    found = {name: last_results(output / name) for name in names}
    sizes, times, files = measure({name: str(output / name) for name in names}, device)
    task = "segm" if "segm/AP" in found["student"] else "bbox"
    scores = [f"{task}/{score}" for score in ("AP", "AP50", "AP75")]
    rows = [
        [name, sizes[name] / 1e6, statistics.median(times[name]), *map(found[name].get, scores)]
        for name in names
    ]
    header = ["", "M parameters", "ms per image", *scores]
    formats = ("", ".2f", ".1f", ".1f", ".1f", ".1f")
    print(tabulate(rows, headers=header, tablefmt="pipe", floatfmt=formats))
    student = found["student"][scores[0]]
    gains = ", ".join(
        f"{name} - student: {found[name][scores[0]] - student:+.1f} AP" for name in methods
    )
    ratio = time_ratio(times["teacher"], times["student"])
    where = "one thread" if device == "cpu" else device
    print(f"the student is {ratio:.1f} times as fast as its teacher (batches of one image, {where})")
    print(f"{gains}; {seconds / 60:.1f} minutes in all")
    print_next_steps(output, names, files)


def print_next_steps(output: Path, names: list[str], files: list[str]) -> None:
    """Commands on the runs of these names, and on images."""
    runs = [str(output / name) for name in names]
    report = ["report", *runs, "--output", str(output / "report.html")]
    predict = ["predict", *(word for run in runs for word in ("--run", run)), *files[:2]]
    print("Next:")
    for words in (report, [*predict, "--output", str(output / "pictures")]):
        print(f"  distill-d2 {shlex.join(words)}")


def measure(
    runs: dict[str, str], device: str
) -> tuple[dict[str, int], dict[str, list[float]], list[str]]:
    """Sizes and speeds of trained detectors, by name.

    Returns:
        numbers of parameters; milliseconds per image, in rounds that all detectors share, on a CPU with one
        thread; and the files of the images.
    """
    import torch
    from detectron2.data import DatasetCatalog
    from detectron2.data.detection_utils import read_image

    from .engine import load_config
    from .inference import load_trained
    from .profiling import milliseconds_per_image

    torch.set_num_threads(1)
    config = load_config(os.path.join(runs["student"], "config.yaml"))  # makes its datasets known
    files = [
        record["file_name"] for record in DatasetCatalog.get(config.DATASETS.TEST[0])[:IMAGES_TIMED]
    ]
    trained = {name: load_trained(run, device=device) for name, run in runs.items()}
    times = milliseconds_per_image(
        {name: each.model for name, each in trained.items()},
        {
            name: [each.inputs(read_image(file, "BGR")) for file in files]
            for name, each in trained.items()
        },
    )
    sizes = {name: sum(p.numel() for p in each.model.parameters()) for name, each in trained.items()}
    return sizes, times, files


def last_results(run: Path) -> dict[str, float]:
    """The last evaluation in a run's metrics.json."""
    lines = [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]
    return [line for line in lines if "bbox/AP" in line][-1]
