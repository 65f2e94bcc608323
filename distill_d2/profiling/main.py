"""What `distill-d2 profile` does: find the detectors, measure them, tell the result."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode

from ..checkpoint import write_whole
from ..inference.images import find_images, read_bgr
from .measure import Profile, profile
from .subjects import Subject, find_subjects
from .table import plain, table
from .timing import torch_threads
from .words import verdict

_MOST_IMAGES = 8
_DEFAULT_SIZE = (800, 1088)


@dataclass(frozen=True)
class Report:
    """Subjects and their profiles, by the same titles, and in words how they were measured."""

    subjects: dict[str, Subject]
    profiles: dict[str, Profile]
    conditions: str

    @property
    def teachers(self) -> dict[str, str]:
        """Titles of teachers by those of their students; see ``find_subjects``."""
        return {title: each.teacher for title, each in self.subjects.items() if each.teacher}

    def verdicts(self) -> list[str]:
        """A sentence on each student and its teacher, see ``verdict``."""
        return [
            verdict(
                self.profiles[title],
                self.profiles[teacher],
                (title, teacher),
                self.subjects[title].config,
            )
            for title, teacher in self.teachers.items()
        ]

    def write(self, path: str) -> None:
        """Write all numbers as json."""
        text = json.dumps(plain(self.profiles, self.teachers), indent=2) + "\n"
        write_whole(path, lambda file: file.write(text.encode()))


def measure(
    runs: Sequence[str],
    config_files: Sequence[str],
    opts: Sequence[str] = (),
    device: str = "cpu",
    size: tuple[int, int] | None = None,
    images: Sequence[str] = (),
    seconds: float = 10.0,
    threads: int = 0,
    onnx: bool = False,
) -> Report:
    """Measure the detectors of runs and configs, and their teachers.

    Args:
        runs, config_files, opts: see ``find_subjects``.
        size: (height, width) of the images in pixels; None: as the first detector's evaluation resizes an image of
            3 x 4.
        images: files, folders or patterns; none: a generated image.
        seconds: about how long to measure times.
        threads: of torch on a CPU; 0: as it chooses.
        onnx: also in onnxruntime, which computes on the CPU; without effect on another device.

    Raises:
        FileNotFoundError, OSError, ValueError, KeyError: an argument names nothing that can be measured.
    """
    pictures = [read_bgr(path) for path in find_images(images)[:_MOST_IMAGES]]
    subjects = find_subjects(runs, config_files, opts, device)
    first = next(iter(subjects.values()))
    models = {title: each.model for title, each in subjects.items()}
    with torch_threads(threads):
        onnx = onnx and device == "cpu"
        profiles = profile(models, size or _size_of(first.config), pictures, seconds, onnx)
        where = f"{device} (threads: {torch.get_num_threads()})" if device == "cpu" else device
    return Report(subjects, profiles, f"one at a time, on {where}")


def tell(report: Report) -> None:
    """Print the table, what it was measured with, and what it means."""
    print(table(report.profiles, report.teachers))
    pixels = (profile.size for profile in report.profiles.values())
    sizes = ", ".join(sorted({f"{height} x {width}" for height, width in pixels}))
    rounds = len(next(iter(report.profiles.values())).milliseconds)
    others = " and ".join(dict.fromkeys(report.teachers.values()))
    ratios = f"; in parentheses the ratio to {others}" if others else ""
    print(
        f"\nImages of {sizes} pixels, {report.conditions}; times are medians of {rounds} rounds{ratios}."
    )
    random = [title for title, each in report.subjects.items() if not each.trained]
    if random:
        print(f"Random weights, which find other objects than trained ones: {', '.join(random)}.")
    problems = dict.fromkeys(each.onnx_problem for each in report.profiles.values() if each.onnx_problem)
    for text in problems:
        print(f"Not measured in onnxruntime: {text}.")
    for text in report.verdicts():
        print(text)


def _size_of(config: object) -> tuple[int, int]:
    """(height, width) to which an evaluation resizes an image of 3 x 4."""
    if not isinstance(config, CfgNode):
        return _DEFAULT_SIZE
    node = config.INPUT
    if node.FIXED_SIZE:
        return tuple(node.FIXED_SIZE)
    shorter = min(node.MIN_SIZE_TEST or _DEFAULT_SIZE[0], round(node.MAX_SIZE_TEST * 3 / 4))
    return shorter, round(shorter * 4 / 3)
