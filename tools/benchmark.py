#!/usr/bin/env python
"""What distillation costs: time and memory of its parts, measured in turn in one process.

    tools/benchmark.py --config-file Distillation-PKD/retinanet_R_50_R101_pkd_FPN_1x.yaml \\
        --size 512 --threads 1 [KEY VALUE ...]

Works on generated images and random weights (a teacher's with MODEL.DISTILLER.TEACHER_WEIGHTS), with
learning rate 0, so that every round does the same work. Each round runs, after one round of warm-up:

    student step             forward, backward and optimizer of the student alone
    teacher part, plain      the part of the teacher that the losses use, as detectron2 built it
    distilled step           forward, backward and optimizer of the Distiller
    teacher part, prepared   the part as the Distiller runs it
    teacher whole, plain     the whole prediction
    <loss> alone             forward and backward of one loss on recorded features

The headline is the ratio distilled step / (student step + teacher part, plain), taken in each round.
On a CPU ratios are of process time, which other work on the machine disturbs least; on a GPU they
are of wall-clock time, with the device synchronised.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import itertools
import json
import logging
import platform
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple

import distill_d2  # noqa: F401  first: it silences known warnings of detectron2
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, FrozenBatchNorm2d
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import nn

from distill_d2 import Distiller, DistillLoss, Teacher
from distill_d2.config import student_config
from distill_d2.engine import build_optimizer
from distill_d2.engine.setup import choose_device, load_config
from distill_d2.engine.step import TrainStep
from distill_d2.engine.trainer import autocast_dtype
from distill_d2.losses import build_losses
from distill_d2.taps import Taps, map_tensors
from distill_d2.teacher import load_teacher_weights, untrained_teacher
from distill_d2.views import Batch

STUDENT, PART, WHOLE = "student step", "teacher part, plain", "teacher whole, plain"
PREPARED, DISTILLED = "teacher part, prepared", "distilled step"
# A loss takes milliseconds, a step seconds: each round repeats the losses this often.
LOSS_REPEATS = 5
MEGABYTE = 2**20


def main(arguments: Optional[List[str]] = None) -> Dict[str, Any]:
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
        tasks = build_tasks(subjects)
        meter = Meter(torch.device(cfg.MODEL.DEVICE))
        rounds = run_rounds(tasks, meter, args.rounds, args.warmup)
        memory = {name: meter.peak_memory(run) for name, run in tasks.items()}
    report = summarise(rounds, memory, meter.clock)
    report["facts"] = facts(args, cfg, meter)
    print_report(report)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    return report


def parse_arguments(arguments: Optional[List[str]]) -> argparse.Namespace:
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
        steps: a training step of the student alone and of the Distiller, on one optimizer.
        iteration: at which every loss is on.
    """

    distiller: Distiller
    plain: Teacher
    inputs: List[Dict[str, Any]]
    steps: Dict[str, TrainStep]
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
    ).to(device)
    for capability in teacher.view.required:
        plain.view.require(capability)
    inputs = generate_inputs(cfg, args, distiller.student_view.num_classes or 1)
    steps = build_steps(cfg, distiller, inputs)
    return Subjects(distiller, plain, inputs, steps, iteration_with_all(distiller.losses))


def build_teachers(node: CfgNode, device: str) -> Tuple[Teacher, Teacher]:
    """The teacher as the Distiller uses it, and a copy as detectron2 builds it."""
    model, input_format = untrained_teacher(node, device)
    if node.TEACHER_WEIGHTS:
        load_teacher_weights(model, node.TEACHER_WEIGHTS, node.TEACHER_ALLOW_MISSING)
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
    cfg: CfgNode, distiller: Distiller, inputs: List[Dict[str, Any]]
) -> Dict[str, TrainStep]:
    optimizer = build_optimizer(cfg, distiller)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    dtype = autocast_dtype(cfg.MODEL.DEVICE) if cfg.SOLVER.AMP.ENABLED else None
    models = {STUDENT: distiller.student, DISTILLED: distiller}
    return {
        name: TrainStep(model, itertools.repeat(inputs), optimizer, autocast_dtype=dtype)
        for name, model in models.items()
    }


def iteration_with_all(losses: Dict[str, DistillLoss]) -> int:
    """The first iteration at which all losses have their full weight."""
    iteration = max(loss.start_iter + loss.warmup_iters for loss in losses.values())
    off = [name for name, loss in losses.items() if loss.factor(iteration) == 0.0]
    if off:
        sys.exit(f"benchmark: {off} would cost nothing: WEIGHT is 0, or STOP_ITER <= {iteration}")
    return iteration


def generate_inputs(cfg: CfgNode, args: argparse.Namespace, classes: int) -> List[Dict[str, Any]]:
    """Smooth random images with random boxes, and polygons where masks are trained."""
    generator = torch.Generator().manual_seed(args.seed)
    return [
        generate_image(cfg, args.size, args.objects, classes, generator) for _ in range(args.batch)
    ]


def generate_image(
    cfg: CfgNode, size: List[int], objects: int, classes: int, generator: torch.Generator
) -> Dict[str, Any]:
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


Tasks = Dict[str, Callable[[], None]]


def build_tasks(subjects: Subjects) -> Tasks:
    """What a round runs, by row name; neighbours in time are those that the headline compares."""
    distiller, plain = subjects.distiller, subjects.plain
    records = record(subjects)
    size = records.batch.padded_size
    tasks: Tasks = {
        STUDENT: subjects.steps[STUDENT].run_step,
        PART: lambda: run_part(plain, subjects.inputs, size),
        DISTILLED: subjects.steps[DISTILLED].run_step,
        PREPARED: lambda: run_part(distiller.teacher, subjects.inputs, size),
        WHOLE: lambda: run_whole(plain, subjects.inputs),
    }
    for name, loss in distiller.losses.items():
        tasks[f"{name} alone"] = loss_task(distiller, loss, loss, records)
        if name in NAIVE:
            tasks[f"{name} alone, naive formula"] = loss_task(
                distiller, loss, naive_of(loss, NAIVE[name]), records
            )
    return tasks


def run_part(teacher: Teacher, inputs: List[Dict[str, Any]], size: Tuple[int, int]) -> None:
    """What the losses ask of a teacher: backbone and neck, and its head where they use that."""
    images = [item["image"].to(teacher.device, non_blocking=True) for item in inputs]
    view = teacher.view
    with view.recording():
        teacher.observe(images, size)
        if "dense" in view.required:
            view.dense()
        if "score_boxes" in view.required:
            view.score_boxes([item["instances"].gt_boxes.to(teacher.device) for item in inputs])


@torch.no_grad()
def run_whole(teacher: Teacher, inputs: List[Dict[str, Any]]) -> None:
    teacher.model(inputs)


@dataclass
class Records:
    """What the losses read in one step: outputs of student and teacher by module, and the batch."""

    student: Dict[str, Any] = field(default_factory=dict)
    teacher: Dict[str, Any] = field(default_factory=dict)
    batch: Optional[Batch] = None
    leaves: List[torch.Tensor] = field(default_factory=list)

    def take(self, _loss: nn.Module, inputs: Tuple[Any, Any, Batch], _terms: Any) -> None:
        """A forward hook for a loss."""
        student, teacher, self.batch = inputs
        self.student.update(outputs_of(student.taps))
        self.teacher.update(outputs_of(teacher.taps))

    def detach(self) -> None:
        """Cut the outputs off the networks; the student's become leaves that take a gradient."""
        self.teacher = map_tensors(torch.Tensor.detach, self.teacher)
        self.student = map_tensors(self._leaf, self.student)

    def _leaf(self, tensor: torch.Tensor) -> torch.Tensor:
        leaf = tensor.detach().requires_grad_(tensor.is_floating_point())
        self.leaves.append(leaf)
        return leaf


def outputs_of(taps: Taps) -> Dict[str, Any]:
    return {path: taps.output(path) for path in taps.recorded}


def record(subjects: Subjects) -> Records:
    """Run a distilled step and keep what the losses read in it."""
    records = Records()
    losses = subjects.distiller.losses.values()
    handles = [loss.register_forward_hook(records.take) for loss in losses]
    subjects.steps[DISTILLED].run_step()
    for handle in handles:
        handle.remove()
    records.detach()
    return records


def loss_task(
    distiller: Distiller, loss: DistillLoss, compute: Callable, records: Records
) -> Callable[[], None]:
    """Forward and backward of ``compute``, the loss or another formula, on recorded outputs."""
    student, teacher = distiller.student_view, distiller.teacher.view

    def run() -> None:
        for _ in range(LOSS_REPEATS):
            # An existing gradient would be added to, which is not the loss's own work.
            for leaf in records.leaves:
                leaf.grad = None
            loss.zero_grad(set_to_none=True)
            with student.recording(), teacher.recording():
                replay(student.taps, records.student)
                replay(teacher.taps, records.teacher)
                terms = compute(student, teacher, records.batch)
            sum(terms.values()).backward()

    run.repeats = LOSS_REPEATS
    return run


def replay(taps: Taps, outputs: Dict[str, Any]) -> None:
    for path, output in outputs.items():
        taps.put(path, output)


def naive_of(loss: DistillLoss, formula: Callable) -> Callable:
    """The plain formula over the level pairs of ``loss``."""

    def compute(student, teacher, _batch) -> Dict[str, torch.Tensor]:
        pairs = loss.pairs(student, teacher).values()
        return {"loss": torch.stack([formula(s, t) for s, t in pairs]).sum()}

    return compute


def naive_pkd(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """PKD as its authors wrote it: standardise both maps (N, C, H, W), then half their MSE."""
    return F.mse_loss(standardise(student), standardise(teacher)) / 2


def standardise(feature: torch.Tensor) -> torch.Tensor:
    count, channels, height, width = feature.shape
    flat = feature.permute(1, 0, 2, 3).reshape(channels, -1)
    flat = (flat - flat.mean(dim=-1, keepdim=True)) / (flat.std(dim=-1, keepdim=True) + 1e-6)
    return flat.reshape(channels, count, height, width).permute(1, 0, 2, 3)


# Plain formulas to compare a loss's own time with, by the loss's registered name.
NAIVE = {"PKD": naive_pkd}


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


def linux_reset_peak() -> Optional[Callable[[], None]]:
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


def run_rounds(tasks: Tasks, meter: Meter, rounds: int, warmup: int) -> Dict[str, List[Sample]]:
    """Samples by task, one of each round. Every other round runs backwards, so that no task always
    follows the same one, in the memory and caches that it leaves."""
    samples: Dict[str, List[Sample]] = {name: [] for name in tasks}
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
    rounds: Dict[str, List[Sample]], memory: Dict[str, float], clock: str
) -> Dict[str, Any]:
    """All measurements in milliseconds and megabytes, and the ratios of each round."""
    times = {name: [getattr(s, clock) for s in samples] for name, samples in rounds.items()}
    floor = [a + b for a, b in zip(times[STUDENT], times[PART])]
    ratios = {
        f"{DISTILLED} / ({STUDENT} + {PART})": paired(times[DISTILLED], floor),
        f"{PREPARED} / {PART}": paired(times[PREPARED], times[PART]),
    }
    for name in times:
        if name.endswith(", naive formula"):
            alone = name[: -len(", naive formula")]
            ratios[f"{alone} / {name}"] = paired(times[alone], times[name])
    rows = {
        name: {
            "wall_ms": [1000 * sample.wall for sample in samples],
            "process_ms": [1000 * sample.process for sample in samples],
            "peak_mb": memory[name],
        }
        for name, samples in rounds.items()
    }
    return {"clock": clock, "rows": rows, "ratios": ratios}


def paired(above: List[float], below: List[float]) -> List[float]:
    return [a / b for a, b in zip(above, below)]


def facts(args: argparse.Namespace, cfg: CfgNode, meter: Meter) -> Dict[str, Any]:
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


def print_report(report: Dict[str, Any]) -> None:
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


def spread(values: List[float], digits: int) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} [{low:.{digits}f} {high:.{digits}f}]"


if __name__ == "__main__":
    main()
