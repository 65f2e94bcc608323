#!/usr/bin/env python
"""What distillation costs: time and memory of its parts, measured in turn in one process.

    tools/benchmark.py --config-file Distillation-PKD/retinanet_R_50_R101_pkd_FPN_1x.yaml \\
        --size 512 --threads 1 [KEY VALUE ...]

Works on generated images and random weights (a teacher's with MODEL.DISTILLER.TEACHER_WEIGHTS), with
learning rate 0, so that every round does the same work. Each round runs, after one round of warm-up:

    student step             forward, backward and optimizer of the student alone; in pure distillation of
                             features (TASK_LOSS_WEIGHT 0) of the part that the losses read, with a loss
                             that costs next to nothing
    teacher part, plain      the part of the teacher that the losses use, as detectron2 built it
    distilled step           forward, backward and all optimizers of the Distiller
    teacher part, prepared   the part as the Distiller runs it
    teacher whole, plain     the whole prediction
    <loss> alone             forward and backward of one loss on recorded features, and the update of
                             its parameters where it has an optimizer of its own
    <loss> part: ...         forward and backward of its parts, where PARTS names any; GID's selection,
                             which has no backward, also on generated predictions for about 5, 20
                             and 80 thousand anchors: at a linear cost each ratio of two is 4, or
                             less where a fixed cost counts

The headline is the ratio distilled step / (student step + teacher part, plain), taken in each round.
Beside "<loss> alone" runs "<loss> alone, naive formula", and time and peak memory of the two are
compared: always where the formula is a few lines below (PKD); with --against-naive also where it is
slower: DeFeat, as plain_defeat.py writes it, GID of RetinaNets, as plain_gid.py does, and an oracle of the
tests, which only a checkout has (InstanceConditionalDistillation, about twice the time of the loss).
On a CPU ratios are of process time, which other work on the machine disturbs least; on a GPU they
are of wall-clock time, with the device synchronised.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import gc
import importlib.util
import itertools
import json
import logging
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Callable

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, FrozenBatchNorm2d
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from loss_parts import PARTS, Compute
from plain_defeat import plain_defeat
from plain_gid import plain_gid
from tabulate import tabulate
from torch import nn

import distill_d2  # noqa: F401  first: it silences known warnings of detectron2
from distill_d2 import Distiller, DistillLoss, Teacher
from distill_d2.config import solver_config, student_config
from distill_d2.engine import build_optimizer
from distill_d2.engine.optimizer import create_optimizer, has_own_solver
from distill_d2.engine.setup import choose_device, load_config
from distill_d2.engine.step import TrainStep
from distill_d2.engine.trainer import autocast_dtype
from distill_d2.losses import build_losses
from distill_d2.taps import Taps, map_tensors
from distill_d2.teacher import load_teacher_weights, untrained_teacher
from distill_d2.views import Batch, DetectorView, Predictions

STUDENT, PART, WHOLE = "student step", "teacher part, plain", "teacher whole, plain"
PREPARED, DISTILLED = "teacher part, prepared", "distilled step"
# A loss takes milliseconds, a step seconds: each round repeats the losses this often.
LOSS_REPEATS = 5
NAIVE_ROW = "{}, naive formula"
# Where the tests keep the naive versions of losses.
ORACLES = Path(__file__).resolve().parents[1] / "tests" / "losses"
MEGABYTE = 2**20


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the program; returns what --json writes."""
    args = parse_arguments(arguments)
    logging.getLogger("distill_d2").setLevel(logging.ERROR)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if args.config_file.endswith(".py"):
        sys.exit(f"benchmark: --config-file {args.config_file}: only yaml configs can be measured")
    cfg = load_config(args.config_file, args.opts)
    cfg.MODEL.DEVICE = args.device or choose_device(cfg.MODEL.DEVICE, num_gpus=0)
    subjects = build_subjects(cfg, args)
    with EventStorage(subjects.iteration):
        tasks = build_tasks(subjects, args.against_naive)
        meter = Meter(torch.device(cfg.MODEL.DEVICE))
        rounds = run_rounds(tasks, meter, args.rounds, args.warmup)
        memory = {name: meter.peak_memory(run) for name, run in tasks.items()}
    report = summarise(rounds, memory, meter.clock, compared_rows(tasks))
    if not meter.per_row:
        report["memory_ratios"] = {}
    report["facts"] = facts(args, cfg, meter)
    print_report(report)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    return report


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="path or packaged name (yaml)")
    parser.add_argument("--size", default="512", help="of the images in pixels: 512, or HEIGHTxWIDTH")
    parser.add_argument("--batch", type=int, default=2, help="images per step")
    parser.add_argument("--objects", type=int, default=8, help="objects per image")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="rounds that are not counted")
    parser.add_argument("--device", default="", help="default: MODEL.DEVICE, or cpu without a GPU")
    parser.add_argument("--threads", type=int, default=0, help="of torch on the CPU; 0: as it chooses")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--against-naive", action="store_true", help="time the slow naive versions of losses too"
    )
    parser.add_argument("--json", default="", help="also write the measurements of every round here")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config")
    args = parser.parse_args(arguments)
    sides = args.size.lower().split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) > 0 for side in sides):
        parser.error(f"--size {args.size}: expected a number of pixels, or HEIGHTxWIDTH")
    for name in ("batch", "rounds", "warmup"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected at least 1")
    args.size = [int(sides[0]), int(sides[-1])]
    return args


# What is measured.


@dataclass
class Subjects:
    """Everything that a round works on.

    Attributes:
        distiller: the distilled student; its own student is the student alone.
        plain: an unprepared copy of the teacher.
        inputs: one batch of the dataset mapper's dicts.
        steps: a training step of the student alone and of the Distiller, on one optimizer; losses
            with an optimizer of their own have it in the second.
        iteration: at which every loss is on.
    """

    distiller: Distiller
    plain: Teacher
    inputs: list[dict[str, Any]]
    steps: dict[str, TrainStep]
    iteration: int


def build_subjects(cfg: CfgNode, args: argparse.Namespace) -> Subjects:
    """Student, teacher and losses of ``cfg`` with random weights, and one batch."""
    config, node, device = student_config(cfg), cfg.MODEL.DISTILLER, cfg.MODEL.DEVICE
    teacher, plain = build_teachers(node, device)
    distiller = Distiller(
        student=calm(META_ARCH_REGISTRY.get(config.MODEL.META_ARCHITECTURE)(config)),
        teacher=teacher,
        losses=build_losses(node),
        input_format=cfg.INPUT.FORMAT,
        task_loss_weight=node.TASK_LOSS_WEIGHT,
        max_iter=cfg.SOLVER.MAX_ITER,
        freeze_names=node.FREEZE,
    ).to(device)
    for capability in teacher.view.required:
        plain.view.require(capability)
    for path in teacher.view.backbone_reads:
        plain.view.require_tap(path)
    inputs = generate_inputs(cfg, args, distiller.student_view.num_classes or 1)
    steps = build_steps(cfg, distiller, inputs)
    return Subjects(distiller, plain, inputs, steps, iteration_with_all(distiller.losses))


def build_teachers(node: CfgNode, device: str) -> tuple[Teacher, Teacher]:
    """The teacher as the Distiller uses it, and a copy as detectron2 builds it."""
    model, input_format = untrained_teacher(node, device)
    if node.TEACHER_WEIGHTS:
        load_weights(model, node)
    else:
        calm(model)
    plain = Teacher(copy.deepcopy(model), input_format=input_format, prepare=False)
    teacher = Teacher(
        model,
        input_format=input_format,
        prepare=node.TEACHER_PREPARE,
        autocast=node.TEACHER_AUTOCAST,
        compile=node.TEACHER_COMPILE,
    )
    return teacher, plain


def load_weights(model: nn.Module, node: CfgNode) -> None:
    try:
        load_teacher_weights(model, node.TEACHER_WEIGHTS, node.TEACHER_ALLOW_MISSING)
    except FileNotFoundError as error:
        sys.exit(
            f"benchmark: the teacher's {error}; to measure with random weights, give "
            'MODEL.DISTILLER.TEACHER_WEIGHTS ""'
        )


def calm(model: nn.Module) -> nn.Module:
    """Keep the activations of random residual blocks, whose frozen norms do nothing, finite."""
    for block in model.modules():
        last = getattr(block, "conv3", None) or getattr(block, "conv2", None)
        if isinstance(block, CNNBlockBase) and isinstance(
            getattr(last, "norm", None), FrozenBatchNorm2d
        ):
            last.norm.weight.fill_(0.2)
    return model


def build_steps(
    cfg: CfgNode, distiller: Distiller, inputs: list[dict[str, Any]]
) -> dict[str, TrainStep]:
    optimizer = build_optimizer(cfg, distiller)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    dtype = autocast_dtype(cfg.MODEL.DEVICE) if cfg.SOLVER.AMP.ENABLED else None
    own = {
        name: own_optimizer(loss, list(loss.parameters()))
        for name, loss in distiller.losses.items()
        if has_own_solver(loss)
    }
    step = partial(
        TrainStep, data_loader=itertools.repeat(inputs), optimizer=optimizer, autocast_dtype=dtype
    )
    alone = PartThatIsRead(distiller.student_view) if distiller.features_only else distiller.student
    return {
        STUDENT: step(alone),
        DISTILLED: step(distiller, own_optimizers=own),
    }


class PartThatIsRead(nn.Module):
    """A student as far as losses read it, with their sum as its loss."""

    def __init__(self, view: DetectorView):
        super().__init__()
        self.student, self.view = view.model, view

    def forward(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        sums: list[torch.Tensor] = []
        with self.view.recording():
            with self.view.until_read():
                self.student(inputs)
            for path in self.view.backbone_reads:
                map_tensors(lambda output: sums.append(output.sum()), self.view.taps.output(path))
        return {"loss_sum": torch.stack(sums).sum()}


def own_optimizer(loss: DistillLoss, parameters: list[torch.Tensor]) -> torch.optim.Optimizer | None:
    """As ``loss`` wants it for its own parameters, but for these and at learning rate 0; None if the
    student's optimizer trains them."""
    if not has_own_solver(loss):
        return None
    node = solver_config()
    node.merge_from_other_cfg(CfgNode(loss.solver))
    node.BASE_LR = 0.0
    trained = [{"params": [p for p in parameters if p.requires_grad]}]
    return create_optimizer(node, trained, "MODEL.DISTILLER.SOLVER")


def iteration_with_all(losses: dict[str, DistillLoss]) -> int:
    """The first iteration at which all losses have their full weight and teach the student."""
    settings = [loss.settings for loss in losses.values()]
    first = max(s.start_iter + s.warmup_iters for s in settings)
    # Other iterations at which something changes: an ICD that trains its decoder first.
    later = {s.bypass_distill for s in settings if hasattr(s, "bypass_distill")}
    for iteration in sorted({first, *(i for i in later if i > first)}):
        off = [name for name, loss in losses.items() if not teaches(loss, iteration)]
        if not off:
            return iteration
    sys.exit(
        f"benchmark: {off} would cost nothing, or not reach the student: WEIGHT or WEIGHT_VALUE is 0, or "
        f"STOP_ITER or BYPASS_DISTILL_AFTER is no later than iteration {iteration}, or DISTILL_ON is 0"
    )


def teaches(loss: DistillLoss, iteration: int) -> bool:
    """Whether the student feels ``loss`` at this iteration."""
    return loss.factor(iteration) > 0 and loss.distils(iteration)


def generate_inputs(cfg: CfgNode, args: argparse.Namespace, classes: int) -> list[dict[str, Any]]:
    """Smooth random images with random boxes, and polygons where masks are trained."""
    generator = torch.Generator().manual_seed(args.seed)
    return [generate_image(cfg, args.size, args.objects, classes, generator) for _ in range(args.batch)]


def generate_image(
    cfg: CfgNode, size: list[int], objects: int, classes: int, generator: torch.Generator
) -> dict[str, Any]:
    height, width = size
    coarse = torch.rand(1, 3, height // 16 + 2, width // 16 + 2, generator=generator) * 255
    image = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)[0]
    scale = torch.tensor([width, height])
    corner = torch.rand(objects, 2, generator=generator) * 0.6
    side = 0.1 + 0.3 * torch.rand(objects, 2, generator=generator)
    boxes = torch.cat([corner * scale, (corner + side) * scale], dim=1)
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(boxes)
    instances.gt_classes = torch.randint(0, classes, (objects,), generator=generator)
    if cfg.MODEL.MASK_ON:
        diamonds = [[diamond(box)] for box in boxes]
        as_bits = cfg.INPUT.MASK_FORMAT == "bitmask"
        instances.gt_masks = (
            BitMasks.from_polygon_masks(diamonds, height, width) if as_bits else PolygonMasks(diamonds)
        )
    image = image.to(torch.uint8)
    return {"image": image, "instances": instances, "height": height, "width": width}


def diamond(box: torch.Tensor):
    """The polygon through the middles of a box's sides: x0, y0, x1, y1, ..."""
    left, top, right, bottom = box.tolist()
    x, y = (left + right) / 2, (top + bottom) / 2
    return torch.tensor([x, top, right, y, x, bottom, left, y]).double().numpy()


# The tasks of a round.


Tasks = dict[str, Callable[[], None]]
NaiveFormula = Callable[[DistillLoss], tuple[Compute, list[torch.Tensor]]]


def build_tasks(subjects: Subjects, against_naive: bool = False) -> Tasks:
    """What a round runs, by row name; neighbours in time are those that the headline compares."""
    distiller, plain = subjects.distiller, subjects.plain
    records = record(subjects)
    asked = partial(run_part, inputs=subjects.inputs, records=records)
    tasks: Tasks = {
        STUDENT: subjects.steps[STUDENT].run_step,
        PART: lambda: asked(plain),
        DISTILLED: subjects.steps[DISTILLED].run_step,
        PREPARED: lambda: asked(distiller.teacher),
        WHOLE: lambda: run_whole(plain, subjects.inputs),
    }
    formulas = {**NAIVE, **(SLOW_NAIVE if against_naive else {})}
    for name, loss in distiller.losses.items():
        tasks.update(loss_tasks(name, loss, formulas.get(name), Replay(distiller, records)))
    return tasks


def loss_tasks(name: str, loss: DistillLoss, formula: NaiveFormula | None, replay: Replay) -> Tasks:
    """The rows of one loss; ``formula`` of NAIVE or SLOW_NAIVE."""
    parameters, alone = list(loss.parameters()), f"{name} alone"
    task = LossTask(replay, loss, parameters, own_optimizer(loss, parameters))
    tasks: Tasks = {alone: task}
    if formula is not None:
        compute, theirs = formula(loss)
        optimizer = own_optimizer(loss, theirs)
        task.against = NAIVE_ROW.format(alone)
        tasks[task.against] = LossTask(replay, compute, theirs, optimizer)
    if name not in PARTS:
        return tasks
    row = f"{name} part: {{}}".format
    for part, (compute, against) in replay(partial(PARTS[name], loss)).items():
        tasks[row(part)] = LossTask(replay, compute, parameters, against=against and row(against))
    return tasks


def compared_rows(tasks: Tasks) -> list[tuple[str, str]]:
    """Pairs of rows whose ratios are printed."""
    against = {name: getattr(task, "against", "") for name, task in tasks.items()}
    return [pair for pair in against.items() if pair[1]]


def run_part(teacher: Teacher, inputs: list[dict[str, Any]], records: Records) -> None:
    """What the losses ask of a teacher: backbone and neck, and its heads where they use these."""
    images = [item["image"].to(teacher.device, non_blocking=True) for item in inputs]
    view = teacher.view
    with view.recording():
        teacher.observe(images, records.batch.padded_size)
        if "dense" in view.required:
            view.dense()
        if "rpn" in view.required:
            view.rpn()
        if records.proposals is not None:
            view.box_head(records.proposals)
        if records.own_proposals is not None:
            view.own_proposals(records.batch)
            view.box_head(records.own_proposals[0])
        if "score_boxes" in view.required:
            view.score_boxes([item["instances"].gt_boxes.to(teacher.device) for item in inputs])


@torch.no_grad()
def run_whole(teacher: Teacher, inputs: list[dict[str, Any]]) -> None:
    teacher.model(inputs)


@dataclass
class Records:
    """What the losses read in one step: outputs of student and teacher by module, and the batch; and,
    for losses on two-stage heads, the proposals that the teacher's head scores, and what it says."""

    student: dict[str, Any] = field(default_factory=dict)
    teacher: dict[str, Any] = field(default_factory=dict)
    batch: Batch | None = None
    leaves: list[torch.Tensor] = field(default_factory=list)
    proposals: list[Boxes] | None = None
    box_head: Predictions | None = None
    own_proposals: tuple[list[Boxes], list[torch.Tensor]] | None = None
    own_box_head: Predictions | None = None

    def take(self, _loss: nn.Module, inputs: tuple[Any, Any, Batch], _terms: Any) -> None:
        """A forward hook for a loss."""
        student, teacher, self.batch = inputs
        self.student.update(outputs_of(student.taps))
        self.teacher.update(outputs_of(teacher.taps))

    @contextlib.contextmanager
    def listening(self, teacher: DetectorView) -> Iterator[None]:
        """Inside, note what the teacher's two-stage heads are asked, and their answers."""
        box_head, own_proposals = teacher.box_head, teacher.own_proposals

        def note_box_head(proposals):
            found = box_head(proposals)
            if self._is_own(proposals):
                self.own_box_head = found
            else:
                self.proposals, self.box_head = proposals, found
            return found

        def note_own_proposals(batch):
            self.own_proposals = own_proposals(batch)
            return self.own_proposals

        teacher.box_head, teacher.own_proposals = note_box_head, note_own_proposals
        try:
            yield
        finally:
            del teacher.box_head, teacher.own_proposals  # the view's methods are back

    @contextlib.contextmanager
    def answering(self, teacher: DetectorView) -> Iterator[None]:
        """Inside, the teacher's two-stage heads are not run: that is no work of a loss, and no tap
        records it."""
        teacher.box_head = lambda boxes: self.own_box_head if self._is_own(boxes) else self.box_head
        teacher.own_proposals = lambda _batch: self.own_proposals
        try:
            yield
        finally:
            del teacher.box_head, teacher.own_proposals

    def _is_own(self, proposals: list[Boxes]) -> bool:
        return self.own_proposals is not None and proposals is self.own_proposals[0]

    def detach(self) -> None:
        """Cut the outputs off the networks; the student's become leaves that take a gradient."""
        self.teacher = map_tensors(torch.Tensor.detach, self.teacher)
        self.student = map_tensors(self._leaf, self.student)

    def _leaf(self, tensor: torch.Tensor) -> torch.Tensor:
        leaf = tensor.detach().requires_grad_(tensor.is_floating_point())
        self.leaves.append(leaf)
        return leaf


def outputs_of(taps: Taps) -> dict[str, Any]:
    return {path: taps.output(path) for path in taps.recorded}


def record(subjects: Subjects) -> Records:
    """Run a distilled step and keep what the losses read in it."""
    records = Records()
    losses = subjects.distiller.losses.values()
    handles = [loss.register_forward_hook(records.take) for loss in losses]
    with records.listening(subjects.distiller.teacher.view):
        subjects.steps[DISTILLED].run_step()
    for handle in handles:
        handle.remove()
    records.detach()
    return records


class Replay:
    """Calls functions on the recorded outputs, as a step of the Distiller would."""

    def __init__(self, distiller: Distiller, records: Records):
        self.student, self.teacher = distiller.student_view, distiller.teacher.view
        self.records = records

    def __call__(self, compute: Callable) -> Any:
        """What ``compute(student, teacher, batch)`` returns, see DistillLoss.forward."""
        with self.student.recording(), self.teacher.recording(), self.records.answering(self.teacher):
            put_outputs(self.student.taps, self.records.student)
            put_outputs(self.teacher.taps, self.records.teacher)
            return compute(self.student, self.teacher, self.records.batch)


def put_outputs(taps: Taps, outputs: dict[str, Any]) -> None:
    for path, output in outputs.items():
        taps.put(path, output)


class LossTask:
    """Forward and backward of a loss, or another formula, on recorded outputs, and the update of its
    parameters by an optimizer of its own; LOSS_REPEATS times.

    Attributes:
        against: name of another row, of which time and memory of this one are printed as ratios.
    """

    repeats = LOSS_REPEATS

    def __init__(
        self,
        replay: Replay,
        compute: Compute,
        parameters: list[torch.Tensor],
        optimizer: torch.optim.Optimizer | None = None,
        against: str = "",
    ):
        self.replay = replay
        self.compute = compute
        self.leaves = [*replay.records.leaves, *parameters]
        self.optimizer = optimizer
        self.against = against

    def __call__(self) -> None:
        for _ in range(self.repeats):
            # An existing gradient would be added to, which is not the loss's own work.
            self.release()
            terms = self.replay(self.compute)
            if terms:  # a part without gradients returns none
                sum(terms.values()).backward()
            if self.optimizer is not None:
                self.optimizer.step()
        self.release()

    def release(self) -> None:
        """Drop all gradients: they are part of the memory of the task that makes them."""
        for leaf in self.leaves:
            leaf.grad = None


# Plain formulas to compare a loss with.


def of_pairs(formula: Callable) -> NaiveFormula:
    """The sum of ``formula(student's map, teacher's map)`` over the level pairs of a loss."""

    def naive(loss: DistillLoss) -> tuple[Compute, list[torch.Tensor]]:
        def compute(student, teacher, _batch):
            pairs = loss.pairs(student, teacher).values()
            return {"loss": torch.stack([formula(s, t) for s, t in pairs]).sum()}

        return compute, list(loss.parameters())

    return naive


def naive_pkd(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """PKD as its authors wrote it: standardise both maps (N, C, H, W), then half their MSE."""
    return F.mse_loss(standardise(student), standardise(teacher)) / 2


def standardise(feature: torch.Tensor) -> torch.Tensor:
    count, channels, height, width = feature.shape
    flat = feature.permute(1, 0, 2, 3).reshape(channels, -1)
    flat = (flat - flat.mean(dim=-1, keepdim=True)) / (flat.std(dim=-1, keepdim=True) + 1e-6)
    return flat.reshape(channels, count, height, width).permute(1, 0, 2, 3)


def naive_icd(loss: DistillLoss) -> tuple[Compute, list[torch.Tensor]]:
    """ICD by the tests' oracle: the same features and numbers of slots, random weights of its own."""
    oracle = load_oracle("naive_icd")
    settings = {name.upper(): value for name, value in vars(loss.settings).items()}
    settings["NUM_CLASSES"] = loss.queries.classes
    device = next(loss.parameters()).device
    weights = {n: w.to(device) for n, w in naive_icd_weights(oracle, settings).items()}
    naive = oracle.NaiveICD(weights, settings, settings, settings["REFERENCE_BUGS"])
    random = np.random.RandomState(0)
    plain: dict[str, torch.Tensor] = {}  # the memory layout of a teacher that nobody prepared

    def compute(student, teacher, batch):
        theirs = loss.pairs.of_teacher(teacher)
        if not plain and not loss.pairs.teacher_adapters:
            plain.update((name, level.contiguous()) for name, level in theirs.items())
        theirs = plain or theirs
        ours = loss.pairs.of_student(student, [level.shape[-2:] for level in theirs.values()])
        instances = [item["instances"] for item in batch.inputs]
        queries = oracle.draw_queries(
            random,
            [real.gt_boxes.tensor.cpu() for real in instances],
            [real.gt_classes.cpu() for real in instances],
            batch.image_sizes,
            *(settings, settings),
        )
        outputs = naive.forward(
            *(theirs, ours, queries.to(device), batch.image_sizes, batch.padded_size),
            iteration=batch.iteration,
            max_iter=batch.max_iter,
        )
        return outputs["losses"]  # the rest would hold memory

    return compute, [*naive.weights.values(), *loss.pairs.parameters()]


def naive_icd_weights(oracle: ModuleType, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The oracle's random weights, with a soft attention as our loss has at the start.

    The oracle's own is sharp, and one-hot on the large features of random networks: nearly all of it
    is denormal numbers then, with which a CPU takes five times as long, and no trained model has them.
    """
    weights = oracle.random_weights(
        torch.Generator().manual_seed(0),
        hidden_dim=settings["HIDDEN_DIM"],
        heads=settings["ATT_HEADS"],
        layers=settings["ATT_LAYERS"],
        classes=settings["NUM_CLASSES"],
        add_scale=settings["ADD_SCALE_INDICATOR"],
        reconst=settings["VALUE_RECONST"] > 0,
    )
    return {n: w * 0.1 if n.endswith("in_proj_weight") else w for n, w in weights.items()}


def load_oracle(name: str) -> ModuleType:
    """A module of the tests' naive versions, by its path: the tests are no package."""
    path = ORACLES / f"{name}.py"
    if not path.is_file():
        sys.exit(f"benchmark: --against-naive needs {path}, which is in a checkout of the repository")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# By a loss's registered name, from the loss: the formula and the parameters that it trains.
NAIVE: dict[str, NaiveFormula] = {"PKD": of_pairs(naive_pkd)}
# Those that take longer than the loss itself.
SLOW_NAIVE: dict[str, NaiveFormula] = {
    "DeFeat": plain_defeat,
    "GID": plain_gid,
    "InstanceConditionalDistillation": naive_icd,
}


# How it is measured.


@dataclass
class Sample:
    """Seconds that one run took."""

    wall: float
    process: float


class Meter:
    """Clock and memory gauge of a device.

    Attributes:
        clock: which of a Sample's times ratios are of, "wall" or "process".
        memory_note: what the memory column holds.
        per_row: whether that is each row's own.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.clock = "wall" if self.on_gpu else "process"
        self.memory_note = "peak memory above what was held before, as the CUDA allocator counts it"
        if not self.on_gpu:
            self._reset_peak = linux_reset_peak()
            self.memory_note = (
                "peak resident memory above what was held before (VmHWM)"
                if self._reset_peak
                else "peak resident memory of the process so far; this system cannot reset it per row"
            )
        self.per_row = self.on_gpu or self._reset_peak is not None

    def time(self, run: Callable[[], None]) -> Sample:
        repeats = getattr(run, "repeats", 1)
        self._wait()
        wall, process = time.perf_counter(), time.process_time()
        run()
        self._wait()
        wall, process = time.perf_counter() - wall, time.process_time() - process
        return Sample(wall / repeats, process / repeats)

    def peak_memory(self, run: Callable[[], None]) -> float:
        """Megabytes, see ``memory_note``. Not to be timed: it returns cached memory first."""
        if isinstance(run, LossTask):
            run.release()  # what another task left would not be counted as this one's
        gc.collect()
        self._wait()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            run()
            return (torch.cuda.max_memory_allocated(self.device) - before) / MEGABYTE
        if not self._reset_peak:
            run()
            return process_peak() / MEGABYTE
        return_freed_memory()
        self._reset_peak()
        before = linux_status("VmRSS")
        run()
        return (linux_status("VmHWM") - before) / MEGABYTE

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


def linux_reset_peak() -> Callable[[], None] | None:
    """A function that sets VmHWM back to VmRSS; None where there is no such thing."""
    path = Path("/proc/self/clear_refs")

    def reset() -> None:
        path.write_text("5")

    try:
        reset()
        linux_status("VmHWM")
    except (OSError, KeyError):
        return None
    return reset


def linux_status(key: str) -> int:
    """Bytes of an entry of /proc/self/status. Raises KeyError if it is not there."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(values[key].split()[0]) * 1024


def process_peak() -> int:
    import resource  # not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_freed_memory() -> None:
    """Have glibc give freed blocks back, so that the next peak counts all that is allocated."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        pass


def run_rounds(tasks: Tasks, meter: Meter, rounds: int, warmup: int) -> dict[str, list[Sample]]:
    """Samples by task, one of each round. Every other round runs backwards, so that no task always
    follows the same one, in the memory and caches that it leaves."""
    samples: dict[str, list[Sample]] = {name: [] for name in tasks}
    for index in range(-warmup, rounds):
        order = list(tasks) if index % 2 == 0 else list(reversed(tasks))
        taken = {name: meter.time(tasks[name]) for name in order}
        if index < 0:
            continue
        for name, sample in taken.items():
            samples[name].append(sample)
        print(f"round {index + 1} of {rounds}", file=sys.stderr, flush=True)
    return samples


# What is printed.


def summarise(
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
        f"{PREPARED} / {PART}": paired(times[PREPARED], times[PART]),
    }
    for above, below in compared:
        ratios[f"{above} / {below}"] = paired(times[above], times[below])
    rows = {
        name: {
            "wall_ms": [1000 * sample.wall for sample in samples],
            "process_ms": [1000 * sample.process for sample in samples],
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


def paired(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below)]


def facts(args: argparse.Namespace, cfg: CfgNode, meter: Meter) -> dict[str, Any]:
    """What the numbers depend on."""
    node, height, width = cfg.MODEL.DISTILLER, *args.size
    return {
        "config": " ".join([args.config_file, *args.opts]),
        "teacher": f"{node.MODEL_DISTILLER_CONFIG}, "
        + ("prepared" if node.TEACHER_PREPARE else "not prepared")
        + (f", autocast {node.TEACHER_AUTOCAST}" if node.TEACHER_AUTOCAST else "")
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
    rows = [
        [name, spread(row["wall_ms"], 1), spread(row["process_ms"], 1), f"{row['peak_mb']:.0f}"]
        for name, row in report["rows"].items()
    ]
    header = ["median [min max]", "wall ms", "process ms", "memory MB"]
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


if __name__ == "__main__":
    main()
