"""What is measured: student, teachers, losses and training steps, built from a config."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, FrozenBatchNorm2d
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from distill_d2 import Distiller, DistillLoss, Teacher
from distill_d2.config import solver_config, student_config
from distill_d2.distiller.phases import reaches_student
from distill_d2.engine import build_optimizer
from distill_d2.engine.optimizer import create_optimizer, has_own_solver
from distill_d2.engine.settings import autocast_dtype
from distill_d2.engine.step import TrainStep
from distill_d2.losses import build_losses
from distill_d2.taps import map_tensors
from distill_d2.teacher import load_teacher_weights, untrained_teacher
from distill_d2.views import DetectorView

from .inputs import generate_inputs

STUDENT, DISTILLED = "student step", "distilled step"


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


def build_subjects(
    cfg: CfgNode, size: tuple[int, int], batch: int = 2, objects: int = 8, seed: int = 0
) -> Subjects:
    """Student, teacher and losses of ``cfg`` with random weights, and one batch of ``batch`` images of
    ``size`` (height, width) with ``objects`` objects each."""
    config, node, device = student_config(cfg), cfg.MODEL.DISTILLER, cfg.MODEL.DEVICE
    teacher, plain = build_teachers(node, device)
    distiller = Distiller(
        student=damp_residual_blocks(META_ARCH_REGISTRY.get(config.MODEL.META_ARCHITECTURE)(config)),
        teacher=teacher,
        losses=build_losses(node),
        input_format=cfg.INPUT.FORMAT,
        task_loss_weight=node.TASK_LOSS_WEIGHT,
        max_iter=cfg.SOLVER.MAX_ITER,
        freeze_names=node.FREEZE,
    ).to(device)
    # Solvers of losses are measured; weights that GRADIENT_RATIO would measure change no time.
    distiller.phases.supported_by_trainer = True
    for capability in teacher.view.required:
        plain.view.require(capability)
    for path in teacher.view.backbone_reads:
        plain.view.require_tap(path)
    classes = distiller.student_view.num_classes or 1
    inputs = generate_inputs(cfg, size, batch, objects, classes, seed)
    steps = build_steps(cfg, distiller, inputs)
    return Subjects(distiller, plain, inputs, steps, iteration_with_all(distiller.losses))


def build_teachers(node: CfgNode, device: str) -> tuple[Teacher, Teacher]:
    """The teacher as the Distiller uses it, and a copy as detectron2 builds it."""
    model, input_format = untrained_teacher(node, device)
    if node.TEACHER_WEIGHTS:
        load_weights(model, node)
    else:
        damp_residual_blocks(model)
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
        raise FileNotFoundError(
            f"the teacher's {error}; to measure with random weights, give MODEL.DISTILLER.TEACHER_WEIGHTS "
            '""'
        ) from error


def damp_residual_blocks(model: nn.Module) -> nn.Module:
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
    """A student as far as losses read it; its loss is the sum of what they read."""

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


def own_optimizer(loss: DistillLoss, parameters: Sequence[torch.Tensor]) -> torch.optim.Optimizer | None:
    """The optimizer that ``loss`` asks for, for its own parameters, on ``parameters`` and with learning
    rate 0; None if the student's optimizer trains them."""
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
    # Other iterations at which something changes: an ICD that teaches its decoder first.
    later = {s.bypass_distill for s in settings if hasattr(s, "bypass_distill")}
    for iteration in sorted({first, *(i for i in later if i > first)}):
        off = [name for name, loss in losses.items() if not teaches(loss, iteration)]
        if not off:
            return iteration
    raise ValueError(
        f"{off} would cost nothing, or not reach the student: WEIGHT or WEIGHT_VALUE is 0, or "
        f"STOP_ITER or BYPASS_DISTILL_AFTER is no later than iteration {iteration}, or DISTILL_ON is 0"
    )


def teaches(loss: DistillLoss, iteration: int) -> bool:
    """Whether the student gets gradients of ``loss`` at this iteration."""
    return reaches_student(loss, iteration)
