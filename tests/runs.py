"""Runs of the two scripts on a tiny dataset, in this process or as commands, and what they leave behind."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from pool import start_script

from distill_d2.engine import DistillTrainer, argument_parser, main, setup
from distill_d2.testing import (
    distiller_config,
    save_teacher,
    short_yaml,
    tiny_config,
    use_dataset,
    write_dataset,
)

ROOT = Path(__file__).resolve().parents[1]


class Job:
    """A student, its teacher and a dataset of six images in a folder, and runs of the scripts on them.

    Attributes:
        config: of the distillation; the baseline's runs ignore its teacher. Change it before a run.
        entry: the dataset's DATASETS.CUSTOM entry.
        text: of the config file, instead of the config's own.
    """

    def __init__(
        self,
        folder: Path,
        family: str = "retinanet",
        *,
        types: Sequence[str] = ("PKD",),
        student: CfgNode | None = None,
        teacher: CfgNode | None = None,
        evaluate: bool = True,
        **sizes: int,
    ):
        """
        Args:
            family: of ``tiny_config``, for the detectors that are not given.
            types: MODEL.DISTILLER.TYPES.
            evaluate: False: no evaluation at the end of a run.
            sizes: of the student, for ``tiny_config``; the teacher has width=16.
        """
        self.folder = folder
        self.entry = write_dataset(folder / "data")
        self.config_file = str(folder / "config.yaml")
        self.text: str | None = None
        student = tiny_config(family, **sizes) if student is None else student.clone()
        student.VERSION = 2
        use_dataset(student, self.entry)
        if not evaluate:
            student.DATASETS.TEST = ()
        path = save_teacher(teacher or tiny_config(family, width=16), folder / "teacher")
        self.config = distiller_config(student, path, types)
        self.config.OUTPUT_DIR = str(folder / "output")
        self.node.MEASURE_GRADIENTS = False  # what few tests look at

    @property
    def node(self) -> CfgNode:
        """MODEL.DISTILLER."""
        return self.config.MODEL.DISTILLER

    @property
    def output(self) -> Path:
        return Path(self.config.OUTPUT_DIR)

    def use_teacher(self, cfg: CfgNode) -> None:
        """Another teacher, with random weights, in the folder "other"."""
        self.node.MODEL_DISTILLER_CONFIG = save_teacher(cfg, self.folder / "other")

    def use_detecting_teacher(self, image_format: str = "BGR") -> CfgNode:
        """A RetinaNet whose scores differ from box to box, unlike those of a new detector; it and the student
        return boxes of any score. Its config."""
        cfg = tiny_config(width=16)
        cfg.INPUT.FORMAT = image_format
        for config in (cfg, self.config):
            config.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
        self.use_teacher(cfg)
        path = self.folder / "other" / "teacher.pth"
        saved = torch.load(path, weights_only=True)
        saved["model"]["head.cls_score.weight"].mul_(10)
        torch.save(saved, path)
        return cfg

    def arguments(self, *arguments: Any, opts: Sequence[Any] = ()) -> argparse.Namespace:
        """The command line's, parsed; writes the config file."""
        Path(self.config_file).write_text(self.text or short_yaml(self.config))
        words = ["--num-gpus", "0", "--config-file", self.config_file, *arguments, *opts]
        return argument_parser().parse_args([str(word) for word in words])

    def run(self, *arguments: Any, distill: bool = True, opts: Sequence[Any] = ()) -> Any:
        """train_distill.py or train_baseline.py in this process; what its main function returns."""
        return main(self.arguments(*arguments, opts=opts), distill)

    def setup(self, *arguments: Any, opts: Sequence[Any] = ()) -> CfgNode:
        """The config as train_distill.py completes it."""
        return setup(self.arguments(*arguments, opts=opts), distill=True)

    def trainer(self, *arguments: Any, opts: Sequence[Any] = ()) -> DistillTrainer:
        """train_distill.py's trainer, its weights loaded, before the first step."""
        trainer = DistillTrainer(self.setup(*arguments, opts=opts))
        trainer.resume_or_load(resume="--resume" in arguments)
        return trainer

    def fails(self, error: Any, *messages: str, **run: Any) -> None:
        """The run stops with this error, whose message holds all of ``messages``; nothing is trained."""
        with pytest.raises(error) as caught:
            self.run(**run)
        for message in messages:
            assert message in str(caught.value)
        metrics_file = self.output / "metrics.json"
        assert not metrics_file.exists() or not metrics_file.read_text()

    def command(self, script: str, *arguments: Any) -> list[str]:
        """A command of the checkout on this job; writes the config file."""
        self.arguments()
        words = ["--num-gpus", "0", "--config-file", self.config_file, *arguments]
        return [sys.executable, str(ROOT / script), *map(str, words)]


def run_commands(*commands: Sequence[str], expect: int = 0) -> list[str]:
    """Run commands at the same time; their outputs. All must exit with ``expect``."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        for c in commands
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    for process, output in zip(processes, outputs):
        assert process.returncode == expect, output[-5000:]
    return outputs


def run_forked(*commands: Sequence[str]) -> list[str]:
    """As ``run_commands``, of commands that start with python and a script, and without the seconds in which a
    new interpreter imports the package; detectron2's own datasets are where they were at its import."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / str(index) for index in range(len(commands))]
        processes = [start_script(words[1:], file) for words, file in zip(commands, files)]
        for process, file in zip(processes, files):
            process.join(timeout=240)
            assert process.exitcode == 0, (process.exitcode, file.read_text()[-5000:])
        return [file.read_text() for file in files]


def run_script(folder: Path, cfg: CfgNode, distill: bool, *arguments: str) -> tuple[Any, set[str]]:
    """Train, or what ``arguments`` say, with OUTPUT_DIR ``folder``/output.

    Returns:
        what the script's main function returns, and the names of the losses that were logged.
    """
    cfg.OUTPUT_DIR = str(folder / "output")
    path = folder / "config.yaml"
    path.write_text(short_yaml(cfg))
    words = ["--num-gpus", "0", "--config-file", str(path), *arguments]
    result = main(argument_parser().parse_args(words), distill)
    lines = metrics(folder / "output")
    return result, {name for line in lines for name in line if name.startswith("loss_")}


# What a run leaves behind.


def checkpoint(folder: Path | str, name: str = "model_final") -> dict[str, Any]:
    return torch.load(Path(folder) / f"{name}.pth", weights_only=True)


def rewind(folder: Path | str, name: str) -> None:
    """Make this checkpoint the last, for --resume."""
    (Path(folder) / "last_checkpoint").write_text(f"{name}.pth")


def metrics(folder: Path | str) -> list[dict[str, float]]:
    """The lines of metrics.json."""
    return [json.loads(line) for line in (Path(folder) / "metrics.json").read_text().splitlines()]


def last_losses(folder: Path | str) -> dict[str, float]:
    """The losses that were logged last."""
    last = [line for line in metrics(folder) if "total_loss" in line][-1]
    return {name: value for name, value in last.items() if name.startswith("loss_")}


def detections(folder: Path | str) -> list[dict[str, Any]]:
    """The detections of an evaluation, as in COCO's json."""
    (file,) = Path(folder).glob("inference/*/coco_instances_results.json")
    return json.loads(file.read_text())


def assert_equal(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> None:
    """The same names and, bit for bit, the same values."""
    assert not changed(first, second)


def changed(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> set[str]:
    """Names of the tensors that differ."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}
