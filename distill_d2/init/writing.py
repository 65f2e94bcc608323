"""The text of the four config files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from .anchors import Anchors
from .backbones import Pair

#: In the order in which they build on each other.
FILES = ("base.yaml", "teacher.yaml", "student.yaml", "distill.yaml")
#: In a run.
EVALUATIONS = 10


@dataclass(frozen=True)
class Plan:
    """What the files say.

    Attributes:
        title: of the dataset, a comment.
        entries: of DATASETS.CUSTOM.
        train, test: names of datasets.
        classes: their names.
        pair: the detectors.
        anchors: of both.
        short, long: sides of resized images, pixels.
        epochs: passes over the images.
        gpu: whether there is one.
        skip_unreadable: whether images that cannot be read are left out.
        pkd: weight of the distillation loss.
        output: the folder of the files and the runs, absolute.
    """

    title: str
    entries: Sequence[dict[str, Any]]
    train: Sequence[str]
    test: Sequence[str]
    classes: Sequence[str]
    pair: Pair
    anchors: Anchors
    short: int
    long: int
    epochs: float
    gpu: bool
    skip_unreadable: bool
    pkd: float
    output: str


def texts(plan: Plan) -> dict[str, str]:
    """The content of each of FILES."""
    teacher, student = (os.path.join(plan.output, name) for name in ("teacher", "student"))
    return {
        "base.yaml": _base(plan),
        "teacher.yaml": f"_BASE_: base.yaml\nMODEL:\n{plan.pair.teacher}OUTPUT_DIR: {_flow(teacher)}\n",
        "student.yaml": f"# The student alone, to compare with.\n_BASE_: base.yaml\nMODEL:\n{_student(plan)}"
        f"OUTPUT_DIR: {_flow(student)}\n",
        "distill.yaml": _distill(plan, teacher),
    }


def _base(plan: Plan) -> str:
    pair = plan.pair
    base = f"_BASE_: {pair.base}\n" if pair.base else ""
    small = _small_levels(plan.anchors.strides) if "small_resnet" in pair.model else ""
    entries = "".join(f"    - {_flow(entry)}\n" for entry in plan.entries)
    skip = "  SKIP_UNREADABLE: True\n" if plan.skip_unreadable else ""
    every = plan.epochs / EVALUATIONS
    return f"""\
# {plan.title}. What teacher and student share; written by distill-d2 init.
{base}MODEL:
{pair.model}{small}  ANCHOR_GENERATOR:
    # Square roots of areas, in pixels of the resized image, on the levels of strides {list(plan.anchors.strides)};
    # heights divided by widths. {100 * plan.anchors.recall:.1f} % of the boxes have an anchor with an IoU of 0.5.
    SIZES: {_flow([list(sizes) for sizes in plan.anchors.sizes])}
    ASPECT_RATIOS: {_flow([list(plan.anchors.ratios)])}
  RETINANET: {{{_retinanet(plan)}}}
DATASETS:
  CUSTOM:
{entries}  TRAIN: {_flow(list(plan.train))}
  TEST: {_flow(list(plan.test))}
{skip}INPUT:  # the shorter side is resized to this, unless the longer one exceeded MAX_SIZE
  MIN_SIZE_TRAIN: [{plan.short}]
  MAX_SIZE_TRAIN: {plan.long}
  MIN_SIZE_TEST: {plan.short}
  MAX_SIZE_TEST: {plan.long}
DATALOADER: {{NUM_WORKERS: {4 if plan.gpu else 0}}}
SOLVER:
  EPOCHS: {plan.epochs:g}  # passes over the training images; longer runs are better, of both
  IMS_PER_BATCH: {pair.batch}
{pair.solver}  CHECKPOINT_EPOCHS: {every:.3g}
TEST:
  EVAL_EPOCHS: {every:.3g}
  KEEP_BEST: bbox/AP  # model_best.pth
SEED: 1
VERSION: 2
"""


def _student(plan: Plan) -> str:
    return plan.pair.student + (plan.pair.fine_student if plan.anchors.strides[0] == 4 else "")


def _distill(plan: Plan, teacher: str) -> str:
    how = (
        "the gradient of the loss in the student's backbone is about the task's at this weight"
        if not plan.pair.pkd
        else "of the paper, for one-stage detectors"
    )
    return f"""\
# The student learns from the teacher as well. PKD makes its feature maps correlate with the teacher's.
_BASE_: student.yaml
MODEL:
  DISTILLER:
    TYPES: [PKD]
    MODEL_LOAD_OFFICIAL: False
    MODEL_DISTILLER_CONFIG: teacher.yaml
    TEACHER_WEIGHTS: {_flow(os.path.join(teacher, "model_best.pth"))}
    # On few images a neck and head that fit the teacher's features are a worse start than random ones.
    PRELOAD_FPN: False
    PRELOAD_HEAD: False
    PKD:
      # {how};
      # `distill-d2 check --config-file distill.yaml` measures it with the trained teacher.
      WEIGHT: {plan.pkd:g}
    EVAL_TEACHER: True
OUTPUT_DIR: {_flow(os.path.join(plan.output, "distilled"))}
"""


def _retinanet(plan: Plan) -> str:
    levels = f"IN_FEATURES: [{', '.join(_levels('p', plan.anchors.strides))}], "
    head = f", {plan.pair.head}" if plan.pair.head else ""
    return f"{levels}NUM_CLASSES: {len(plan.classes)}{head}"


def _small_levels(strides: Sequence[int]) -> str:
    return f"  SMALL_RESNET: {{OUT_FEATURES: [{', '.join(_levels('res', strides))}]}}\n"


def _levels(prefix: str, strides: Sequence[int]) -> list[str]:
    """The names of levels by their strides: 4 is p2, or res2."""
    return [f"{prefix}{stride.bit_length() - 1}" for stride in strides]


def _flow(value: Any) -> str:
    """A value as yaml in one line."""
    text = yaml.safe_dump(
        value, default_flow_style=True, width=10**6, sort_keys=False, allow_unicode=True
    )
    return text.partition("\n")[0]
