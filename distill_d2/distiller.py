"""The Distiller: a student that learns from a frozen teacher while it is trained as usual."""

from __future__ import annotations

import contextlib
import logging
import math
from typing import Any, Dict, Iterator, List, Mapping, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import get_event_storage, has_event_storage
from tabulate import tabulate
from torch import nn

from .config import student_config
from .losses import DistillLoss, build_losses
from .preload import preload
from .teacher import Teacher, teacher_of
from .views import Batch, build_view

logger = logging.getLogger(__name__)

_PREFIX = "distiller."


@META_ARCH_REGISTRY.register()
class Distiller(nn.Module):
    """Wraps a detectron2 model, the student, and distils a teacher into it.

    In training, ``forward`` returns the student's own losses and one term per distillation loss.
    In evaluation it is the student. ``state_dict()`` is the plain student's; parameters of the
    losses, where there are any, follow under the prefix "distiller.".

    Attributes:
        student: the model being trained, untouched but for forward hooks that remember outputs.
        teacher: a Teacher; not a submodule, yet moved along by ``.to()``.
        losses: the distillation losses by registered name.
    """

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: Teacher,
        losses: Union[Mapping[str, DistillLoss], Sequence[DistillLoss]],
        input_format: str = "BGR",
        task_loss_weight: float = 1.0,
        max_iter: int = 0,
        preload_fpn: bool = False,
        preload_head: bool = False,
    ):
        """
        Args:
            student: a detectron2 detector with a ``backbone``.
            teacher: a whole, frozen detector.
            losses: distillation losses by name, or a list (each named by its class); they are bound
                to both detectors here.
            input_format: channel order of the images in the batches, "BGR" or "RGB".
            task_loss_weight: multiplies the student's own losses.
            max_iter: length of the run, for losses with a schedule over all of it.
            preload_fpn, preload_head: what ``preload_student`` copies from the teacher.

        Raises:
            KeyError, TypeError, ValueError: a loss asks for what a detector cannot give.
        """
        super().__init__()
        if input_format not in ("BGR", "RGB"):
            raise ValueError(f"INPUT.FORMAT is '{input_format}'; the Distiller reads 'BGR' or 'RGB'")
        self.student = student
        if not isinstance(losses, Mapping):
            losses = {type(loss).__name__: loss for loss in losses}
        self.losses = nn.ModuleDict(losses)
        # Past Module.__setattr__'s registration: law 2, the teacher is invisible.
        object.__setattr__(self, "teacher", teacher)
        self.student_view = build_view(student, "student")
        self.task_loss_weight = task_loss_weight
        self.max_iter = max_iter
        self.preload_fpn = preload_fpn
        self.preload_head = preload_head
        self._flip = input_format != teacher.input_format
        self._steps = 0
        self._padded_size: Tuple[int, int] = (0, 0)
        with separate_randomness():
            for loss in self.losses.values():
                loss.bind(self.student_view, teacher.view)
        teacher.check_taps()
        student.backbone.register_forward_pre_hook(self._pad_student)
        self._log_start()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Dict[str, Any]:
        node = cfg.MODEL.DISTILLER
        config = student_config(cfg)
        student = META_ARCH_REGISTRY.get(config.MODEL.META_ARCHITECTURE)(config)
        return {
            "student": student,
            **teacher_and_losses(node, cfg.MODEL.DEVICE),
            "input_format": cfg.INPUT.FORMAT,
            "task_loss_weight": node.TASK_LOSS_WEIGHT,
            "max_iter": cfg.SOLVER.MAX_ITER,
            "preload_fpn": node.PRELOAD_FPN,
            "preload_head": node.PRELOAD_HEAD,
        }

    @property
    def device(self) -> torch.device:
        return next(self.student.parameters()).device

    def preload_student(self) -> None:
        """Copy the teacher's FPN and heads into the student, as PRELOAD_FPN and PRELOAD_HEAD say.

        For a fresh run, after MODEL.WEIGHTS is loaded; DistillTrainer calls it.
        """
        if self.preload_fpn or self.preload_head:
            preload(self.student, self.teacher.model, fpn=self.preload_fpn, head=self.preload_head)

    def forward(self, batched_inputs: List[Dict[str, Any]]):
        """detectron2's model interface.

        Args:
            batched_inputs: N dicts of the dataset mapper, with "image" (3, H_i, W_i) and, in
                training, "instances".

        Returns:
            in training {name: scalar loss}, weighted; in evaluation the student's predictions.
        """
        if not self.training:
            return self.student(batched_inputs)
        images = [item["image"].to(self.device, non_blocking=True) for item in batched_inputs]
        inputs = [{**item, "image": image} for item, image in zip(batched_inputs, images)]
        factors = {name: loss.factor(self.iteration) for name, loss in self.losses.items()}
        with self.student_view.recording(), self.teacher.view.recording():
            losses = self._task_losses(inputs)
            if any(factors.values()):
                flipped = [image.flip(0) for image in images] if self._flip else images
                self.teacher.observe(flipped, self._padded_size)
            batch = Batch(inputs, self._padded_size, self.iteration, self.max_iter)
            for name, loss in self.losses.items():
                _add(losses, self._distill_losses(loss, factors[name], batch), name)
        self._steps += 1
        return losses

    @property
    def iteration(self) -> int:
        """The trainer's iteration; without a trainer, the number of training steps done."""
        return get_event_storage().iter if has_event_storage() else self._steps

    def _task_losses(self, inputs: List[Dict[str, Any]]) -> Dict[str, torch.Tensor]:
        losses = dict(self.student(inputs))
        if self.task_loss_weight == 1.0:
            return losses
        return {name: loss * self.task_loss_weight for name, loss in losses.items()}

    def _distill_losses(
        self, loss: DistillLoss, factor: float, batch: Batch
    ) -> Dict[str, torch.Tensor]:
        if factor == 0.0:
            return loss.idle()
        with torch.autocast(self.device.type, enabled=False):  # law 7: always in float32
            terms = loss(self.student_view, self.teacher.view, batch)
        return {name: term * factor for name, term in terms.items()}

    # One common padding (law 6).

    def _pad_student(self, _backbone: nn.Module, inputs: Tuple[torch.Tensor, ...]):
        """Note the padded size; pad further where the teacher needs a coarser multiple."""
        if not self.training:
            return None
        height, width = inputs[0].shape[-2:]
        self._padded_size = self._common_size(height, width)
        if self._padded_size == (height, width):
            return None
        missing = (self._padded_size[0] - height, self._padded_size[1] - width)
        return (F.pad(inputs[0], (0, missing[1], 0, missing[0])),)

    def _common_size(self, height: int, width: int) -> Tuple[int, int]:
        divisibility, square = self.teacher.padding
        multiple = math.lcm(divisibility, max(self.student.backbone.size_divisibility, 1))
        height, width = max(height, square), max(width, square)
        if height % divisibility == 0 and width % divisibility == 0:
            return height, width
        return -(-height // multiple) * multiple, -(-width // multiple) * multiple

    # The teacher is moved along, and never seen otherwise (law 2).

    def _apply(self, function, *args, **kwargs):
        super()._apply(function, *args, **kwargs)
        self.teacher.apply(function)
        return self

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        """The student's own state_dict; parameters of the losses follow under "distiller."."""
        state = self.student.state_dict(
            *args, destination=destination, prefix=prefix, keep_vars=keep_vars
        )
        return self.losses.state_dict(
            destination=state, prefix=prefix + _PREFIX, keep_vars=keep_vars
        )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, **kwargs):
        """Load what ``state_dict`` gave, or a plain student's checkpoint (with strict=False)."""
        ours = {k[len(_PREFIX) :]: v for k, v in state_dict.items() if k.startswith(_PREFIX)}
        theirs = {k: v for k, v in state_dict.items() if not k.startswith(_PREFIX)}
        keys = self.student.load_state_dict(theirs, strict=strict, **kwargs)
        if ours or strict:
            of_losses = self.losses.load_state_dict(ours, strict=strict, **kwargs)
            keys.missing_keys.extend(_PREFIX + name for name in of_losses.missing_keys)
            keys.unexpected_keys.extend(_PREFIX + name for name in of_losses.unexpected_keys)
        return keys

    # What is logged at start-up.

    def _log_start(self) -> None:
        logger.info(f"Teacher: {self.teacher.describe()}")
        size = self._common_size(*([2 * max(self.student.backbone.size_divisibility, 32)] * 2))
        student, teacher = self.student_view.probe(*size), self.teacher.view.probe(*size)
        rows = [
            [name, *row]
            for name, loss in self.losses.items()
            for pairs in loss.feature_pairs()
            for row in pairs.describe(student, teacher)
        ]
        if not rows:
            return
        header = ["loss", "level", "stride", "student (C, H, W)", "teacher (C, H, W)", "adapter"]
        logger.info(
            f"Levels compared (shapes of a {size[0]}x{size[1]} image):\n"
            + tabulate(rows, headers=header, tablefmt="pipe")
        )


def teacher_and_losses(distiller: CfgNode, device: str) -> Dict[str, Any]:
    """The arguments ``losses`` and ``teacher`` of Distiller, from a MODEL.DISTILLER node."""
    with separate_randomness():
        return {"losses": build_losses(distiller), "teacher": teacher_of(distiller, device)}


def _add(losses: Dict[str, torch.Tensor], terms: Dict[str, torch.Tensor], name: str) -> None:
    repeated = sorted(set(losses) & set(terms))
    if repeated:
        raise ValueError(f"the loss {name} returns terms {repeated}, which exist already")
    losses.update(terms)


@contextlib.contextmanager
def separate_randomness() -> Iterator[None]:
    """Draws inside leave the random numbers outside as train_baseline.py has them (law 1)."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield
