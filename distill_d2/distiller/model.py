"""The Distiller meta-architecture: a student's step, a teacher's step, and the losses between them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import nn

from ..config import student_config
from ..freeze import freeze, freeze_unreached
from ..initialize_losses import initialize_losses
from ..initialize_student import initialize_student
from ..losses import DistillLoss
from ..losses.settings import is_finite
from ..rules import assertions_told, check_model
from ..teacher import Teacher
from ..views import Batch, build_view
from .building import node_arguments, separate_randomness
from .padding import CommonPadding
from .phases import TrainingPhases, add_terms, check_terms, gradient_ratios, reaches_student
from .report import describe_levels

logger = logging.getLogger(__name__)

_PREFIX = "distiller."

Images = list[torch.Tensor]
Terms = dict[str, torch.Tensor]


@META_ARCH_REGISTRY.register()
class Distiller(nn.Module):
    """Wraps a detectron2 model, the student, and distills a teacher into it.

    In training, ``forward`` returns the student's own losses and one term per distillation loss.
    In evaluation it is the student. ``state_dict()`` is the plain student's; parameters of the
    losses, if there are any, follow under the prefix "distiller.". A copy has a student, losses and
    taps of its own, and shares the teacher's frozen weights.

    Attributes:
        student: the model being trained. It has forward hooks during a training step only, so that it
            can be pickled, copied and scripted.
        teacher: a Teacher; not a submodule, but ``.to()`` moves it too.
        losses: the distillation losses by registered name.
        features_only: whether a training step runs the student only as far as the losses read it.
        phases: what is trained when; a trainer reads it.
        owners: of the terms of the last step that are not the student's own, the loss of each one, by name.
        gradient_ratio_period: steps between two measurements of the losses' gradients; a trainer reads it.
    """

    # Any, because Module's annotations know none of a detector's attributes, nor ModuleDict's of its values.
    student: Any
    losses: Any
    owners: dict[str, str]
    gradient_ratio_period: int

    @configurable
    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: Teacher,
        losses: Mapping[str, DistillLoss] | Sequence[DistillLoss],
        input_format: str = "BGR",
        task_loss_weight: float = 1.0,
        max_iter: int = 0,
        preload_fpn: bool = False,
        preload_head: bool = False,
        preload_names: Sequence[str] = (),
        preload_teacher: str = "",
        preload_type: str = "teacher_only",
        pretrain_iters: int = 0,
        fix_backbone_before: int = 0,
        fix_head_before: int = 0,
        freeze_names: Sequence[str] = (),
        gradient_ratio_period: int = 0,
    ):
        """
        Args:
            student: a detectron2 detector with a ``backbone``.
            teacher: a whole, frozen detector.
            losses: distillation losses by name, or a list (each named by its class); they are bound
                to both detectors here.
            input_format: channel order of the images in the batches, "BGR" or "RGB".
            task_loss_weight: multiplies the student's own losses. With 0 the student runs only as far as
                the losses read it, and what they do not reach is not trained.
            max_iter: length of the run, for losses with a schedule over all of it.
            preload_fpn, preload_head: what ``preload_student`` copies from the teacher into the student.
            preload_names: regular expressions of further tensors that it copies.
            preload_teacher: path or URL of an earlier run's checkpoint, from which it takes the losses'
                parameters.
            preload_type: "all" of these parameters, or "teacher_only".
            pretrain_iters: steps before iteration 0, in which only the losses' ``pretrain`` is computed.
            fix_backbone_before: the student's backbone is not trained before this iteration.
            fix_head_before: the rest of the student is not trained before this iteration.
            freeze_names: regular expressions of names in the student's ``state_dict()``: parameters
                that are not trained, and running statistics of batch norms that do not change.
            gradient_ratio_period: above 0: in every this many steps DistillTrainer measures the gradient of
                each loss in the student's backbone and neck.

        Raises:
            KeyError, TypeError, ValueError: a loss asks for what a detector cannot give; a number
                of iterations is negative; no loss can be pretrained, or no parameter is left to
                train; a pattern matches no name.
        """
        super().__init__()
        if input_format not in ("BGR", "RGB"):
            raise ValueError(f"INPUT.FORMAT is '{input_format}'; the Distiller reads 'BGR' or 'RGB'")
        if preload_type not in ("all", "teacher_only"):
            raise ValueError(
                f"MODEL.DISTILLER.PRELOAD_TYPE is '{preload_type}'; expected 'all' or 'teacher_only'"
            )
        if not is_finite(task_loss_weight) or task_loss_weight < 0:
            raise ValueError(
                f"MODEL.DISTILLER.TASK_LOSS_WEIGHT is {task_loss_weight!r}; expected a finite number, at least 0"
            )
        if not isinstance(losses, Mapping):
            losses = {type(loss).__name__: loss for loss in losses}
        self.student = student
        self.losses = nn.ModuleDict(losses)
        self.teacher = teacher
        self.student_view = build_view(student, "student")
        self.task_loss_weight = task_loss_weight
        self.max_iter = max_iter
        self.preload_fpn = preload_fpn
        self.preload_head = preload_head
        self.preload_names = list(preload_names)
        self.preload_teacher = preload_teacher
        self.preload_type = preload_type
        self.phases = TrainingPhases(
            student,
            self.losses,
            pretrain_iters=pretrain_iters,
            fix_backbone_before=fix_backbone_before,
            fix_head_before=fix_head_before,
        )
        self.padding = CommonPadding(self.student.backbone, *teacher.padding)
        self._reverse_channels = input_format != teacher.input_format
        self._steps = 0
        self.owners = {}
        self.gradient_ratio_period = gradient_ratio_period
        self._check_ratios()
        with separate_randomness():
            for loss in losses.values():
                loss.bind(self.student_view, teacher.view)
        teacher.check_taps()
        self._check_fixed_size()
        self._choose_trained(freeze_names)
        self._log_start()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        config = student_config(cfg)
        check_model(config)
        with assertions_told("the student"):
            student = META_ARCH_REGISTRY.get(config.MODEL.META_ARCHITECTURE)(config)
        return {
            "student": student,
            **node_arguments(cfg.MODEL.DISTILLER, cfg.MODEL.DEVICE, cfg.DATASETS.TRAIN),
            "input_format": cfg.INPUT.FORMAT,
            "max_iter": cfg.SOLVER.MAX_ITER,
        }

    @property
    def device(self) -> torch.device:
        return next(self.student.parameters()).device

    @property
    def iteration(self) -> int:
        """The student's iteration, negative while losses are pretrained; without a trainer, the
        number of training steps done."""
        steps = get_event_storage().iter if has_event_storage() else self._steps
        return steps - self.phases.pretrain_iters

    def preload_student(self) -> None:
        """Start the student from the teacher, as PRELOAD_FPN, _HEAD and _NAMES say, and the losses'
        parameters from an earlier run, as PRELOAD_TEACHER says.

        For a fresh run, after MODEL.WEIGHTS is loaded; DistillTrainer calls it.

        Raises:
            OSError, ValueError: nothing fits, or PRELOAD_TEACHER cannot be read.
        """
        if self.preload_fpn or self.preload_head or self.preload_names:
            initialize_student(
                self.student,
                self.teacher.model,
                fpn=self.preload_fpn,
                head=self.preload_head,
                names=self.preload_names,
            )
        if self.preload_teacher:
            initialize_losses(self.losses, self.preload_teacher, self.preload_type)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """detectron2's model interface.

        Args:
            batched_inputs: N dicts of the dataset mapper, with "image" (3, H_i, W_i) and, in
                training, "instances".

        Returns:
            in training {name: scalar loss}, weighted; in evaluation the student's predictions.
        """
        if not self.training:
            return self.student(batched_inputs)
        self.phases.check_trainer(first_step=self._steps == 0)
        originals = [item["image"] for item in batched_inputs]
        images = [image.to(self.device, non_blocking=True) for image in originals]
        inputs = [{**item, "image": image} for item, image in zip(batched_inputs, images)]
        step = self._pretrain if self.iteration < 0 else self._train
        losses = step(inputs, images, originals)
        self._steps += 1
        return losses

    def train(self, mode: bool = True) -> Distiller:
        super().train(mode)
        for norm in self._still_norms:
            norm.eval()
        return self

    def release(self) -> None:
        """Take all hooks off student and teacher; outside a training step there are none."""
        self.student_view.taps.release()
        self.teacher.view.taps.release()

    def describe_levels(self) -> str:
        """A table of the levels that the losses compare; "" if there are none."""
        views = (self.student_view, self.teacher.view)
        size = self.padding.of_image(*map(max, *(view.probe_size for view in views)))
        return describe_levels(self.losses, *views, size)

    # A training step.

    def _train(self, inputs: list[dict[str, Any]], images: Images, originals: Images) -> Terms:
        factors = {name: loss.factor(self.iteration) for name, loss in self.losses.items()}
        with self.student_view.recording(), self.teacher.view.recording():
            losses = self._task_losses(inputs)
            self._apply_task_weights(losses, factors)
            if any(factors.values()):
                self._observe(images, originals)
            batch = Batch(inputs, self.padding.size, self.iteration, self.max_iter)
            self.owners = {}
            for name, loss in self.losses.items():
                terms = self._distill_losses(loss, factors[name], batch)
                add_terms(losses, terms, name)
                self.owners.update(dict.fromkeys(terms, name))
        if self.features_only and not all(
            reaches_student(loss, self.iteration) for loss in self.losses.values()
        ):
            losses["loss_idle"] = self._zero()
        return losses

    def _task_losses(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        with self.padding.applied():
            if self.features_only:
                with self.student_view.until_read():
                    self.student(inputs)
                return {}
            losses = dict(self.student(inputs))
        if self.task_loss_weight == 1.0:
            return losses
        return {name: loss * self.task_loss_weight for name, loss in losses.items()}

    def _apply_task_weights(
        self, task_losses: dict[str, torch.Tensor], factors: Mapping[str, float]
    ) -> None:
        """Multiply the student's own losses, in place, by the factors that active losses ask for."""
        for name, loss in self.losses.items():
            for term, weight in loss.task_weights.items() if factors[name] else ():
                if term in task_losses and weight != 1.0:
                    task_losses[term] = task_losses[term] * weight

    def _observe(self, images: Images, originals: Images) -> None:
        """Show the images to the teacher; ``originals`` are those of the batch, where the mapper left them."""
        if self.teacher.cache is None or any(image.is_cuda for image in originals):
            originals = []
        if self._reverse_channels:
            images, originals = ([image.flip(0) for image in part] for part in (images, originals))
        self.teacher.observe(images, self.padding.size, originals)

    def _distill_losses(self, loss: DistillLoss, factor: float, batch: Batch) -> dict[str, torch.Tensor]:
        if factor == 0.0:
            return loss.idle()
        with torch.autocast(self.device.type, enabled=False):  # law 7: always in float32
            terms = loss(self.student_view, self.teacher.view, batch)
        if self._steps == 0:
            check_terms(terms, loss)
        return {name: term * factor for name, term in terms.items()}

    def _pretrain(self, inputs: list[dict[str, Any]], images: Images, originals: Images) -> Terms:
        """The losses learn from the teacher alone."""
        self.padding.size = self.padding.of_images(images)
        batch = Batch(inputs, self.padding.size, self.iteration, self.max_iter)
        with self.teacher.view.recording():
            self._observe(images, originals)
            with torch.autocast(self.device.type, enabled=False):
                terms = self.phases.pretrain(self.teacher.view, batch)
        first = next(iter(terms))
        return {**terms, first: terms[first] + self._zero()}

    def _zero(self) -> torch.Tensor:
        """A zero that depends on every trained parameter, so that DDP gets all gradients."""
        sums = [p.sum() for p in self.parameters() if p.requires_grad]
        return torch.stack(sums).sum() * 0.0

    # Checks, choices and log messages of the constructor.

    def _check_ratios(self) -> None:
        ratios = gradient_ratios(self.losses)
        if self.gradient_ratio_period:
            ratios["MODEL.DISTILLER.GRADIENT_RATIO_PERIOD"] = self.gradient_ratio_period
        if ratios and self.task_loss_weight == 0:
            given = ", ".join(f"{key} is {value}" for key, value in ratios.items())
            raise ValueError(
                f"{given}, but MODEL.DISTILLER.TASK_LOSS_WEIGHT is 0: without the student's own losses there is "
                "no gradient to compare with; expected 0, and weights of the losses"
            )

    def _check_fixed_size(self) -> None:
        side = self.student_view.fixed_size
        if side is None or self.padding.of(side, side) == (side, side):
            return
        height, width = self.padding.of(side, side)
        raise ValueError(
            f"the student, a {type(self.student).__name__}, takes images of {side}x{side} pixels only, but the "
            f"teacher, a {type(self.teacher.model).__name__}, would pad them to {height}x{width}; train the "
            f"student at a size that both take, such as {max(height, width)}"
        )

    def _choose_trained(self, freeze_names: Sequence[str]) -> None:
        self._still_norms = freeze(self.student, freeze_names, "MODEL.DISTILLER.FREEZE")
        self.features_only = self.task_loss_weight == 0 and bool(self.student_view.backbone_reads)
        if self.features_only:
            freeze_unreached(self.student_view)
        if not any(p.requires_grad for p in self.student.parameters()):
            raise ValueError(
                f"MODEL.DISTILLER.FREEZE is {list(freeze_names)}, TASK_LOSS_WEIGHT {self.task_loss_weight} "
                f"and TYPES {list(self.losses)}: no parameter of the student is left to train"
            )

    def _log_start(self) -> None:
        logger.info(f"Teacher: {self.teacher.describe()}")
        table = self.describe_levels()
        if table:
            logger.info(table)

    # The teacher moves with the student, and is not visible otherwise (law 2).

    def _apply(self, function, *args, **kwargs):
        super()._apply(function, *args, **kwargs)
        self.teacher.apply(function)
        return self

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        """The student's own state_dict; parameters of the losses follow under "distiller."."""
        state = self.student.state_dict(
            *args, destination=destination, prefix=prefix, keep_vars=keep_vars
        )
        return self.losses.state_dict(destination=state, prefix=prefix + _PREFIX, keep_vars=keep_vars)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load what ``state_dict`` returned, or a plain student's checkpoint (with strict=False)."""
        of_losses = {k[len(_PREFIX) :]: v for k, v in state_dict.items() if k.startswith(_PREFIX)}
        of_student = {k: v for k, v in state_dict.items() if not k.startswith(_PREFIX)}
        keys = self.student.load_state_dict(of_student, strict=strict, assign=assign)
        if of_losses or strict:
            loss_keys = self.losses.load_state_dict(of_losses, strict=strict, assign=assign)
            keys.missing_keys.extend(_PREFIX + name for name in loss_keys.missing_keys)
            keys.unexpected_keys.extend(_PREFIX + name for name in loss_keys.unexpected_keys)
        return keys
