"""The Distiller: a student that learns from a frozen teacher while it is trained as usual."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList
from detectron2.utils.events import get_event_storage, has_event_storage
from tabulate import tabulate
from torch import nn

from .config import student_config
from .data import box_statistics
from .freeze import freeze, freeze_unreached
from .losses import DistillLoss, build_losses
from .plugins import import_detectors
from .preload import preload, preload_losses
from .teacher import Teacher, teacher_of
from .views import Batch, DetectorView, build_view

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
        features_only: whether a training step runs the student only as far as the losses read it.
        trainer_has_phases: set by a trainer that runs ``pretrain_iters`` steps more, drops the
            gradients of ``frozen_parameters``, and gives losses the solver of their own.
    """

    trainer_has_phases = False

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
    ):
        """
        Args:
            student: a detectron2 detector with a ``backbone``.
            teacher: a whole, frozen detector.
            losses: distillation losses by name, or a list (each named by its class); they are bound
                to both detectors here.
            input_format: channel order of the images in the batches, "BGR" or "RGB".
            task_loss_weight: multiplies the student's own losses; 0: the student runs only as far as the
                losses read it, and what they do not reach is not trained.
            max_iter: length of the run, for losses with a schedule over all of it.
            preload_fpn, preload_head: what ``preload_student`` copies from the teacher into the student;
                preload_names: and tensors whose names match one of these regular expressions.
            preload_teacher: path or URL of an earlier run's checkpoint, from which it takes the losses'
                parameters; preload_type: "all" of them, or "teacher_only".
            pretrain_iters: steps before iteration 0, in which only the losses' ``pretrain`` is computed.
            fix_backbone_before, fix_head_before: the student's backbone, or the rest of it, is not
                trained before this iteration.
            freeze_names: regular expressions of names in the student's ``state_dict()``: parameters
                that are not trained, and running statistics of batch norms that stay.

        Raises:
            KeyError, TypeError, ValueError: a loss asks for what a detector cannot give; a number
                of iterations is negative; there is nothing to pretrain, or to train; a pattern fits
                no name.
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
        self.preload_names = list(preload_names)
        self.preload_teacher = preload_teacher
        self.preload_type = preload_type
        if preload_type not in ("all", "teacher_only"):
            raise ValueError(
                f"MODEL.DISTILLER.PRELOAD_TYPE is '{preload_type}'; expected 'all' or 'teacher_only'"
            )
        self.pretrain_iters = pretrain_iters
        self.fix_backbone_before = fix_backbone_before
        self.fix_head_before = fix_head_before
        self._check_phases()
        self._flip = input_format != teacher.input_format
        self._steps = 0
        self._padded_size: tuple[int, int] = (0, 0)
        with separate_randomness():
            for loss in self.losses.values():
                _bind(loss, self.student_view, teacher.view)
        teacher.check_taps()
        self._check_fixed_size()
        self._choose_trained(freeze_names)
        student.backbone.register_forward_pre_hook(self._pad_student)
        self._log_start()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.DISTILLER
        config = student_config(cfg)
        import_detectors(config)
        student = META_ARCH_REGISTRY.get(config.MODEL.META_ARCHITECTURE)(config)
        return {
            "student": student,
            **node_arguments(node, cfg.MODEL.DEVICE, cfg.DATASETS.TRAIN),
            "input_format": cfg.INPUT.FORMAT,
            "max_iter": cfg.SOLVER.MAX_ITER,
        }

    @property
    def device(self) -> torch.device:
        return next(self.student.parameters()).device

    def preload_student(self) -> None:
        """Start the student from the teacher, as PRELOAD_FPN, _HEAD and _NAMES say, and the losses'
        parameters from an earlier run, as PRELOAD_TEACHER says.

        For a fresh run, after MODEL.WEIGHTS is loaded; DistillTrainer calls it.

        Raises:
            OSError, ValueError: nothing fits, or PRELOAD_TEACHER cannot be read.
        """
        if self.preload_fpn or self.preload_head or self.preload_names:
            preload(
                self.student,
                self.teacher.model,
                fpn=self.preload_fpn,
                head=self.preload_head,
                names=self.preload_names,
            )
        if self.preload_teacher:
            preload_losses(self.losses, self.preload_teacher, self.preload_type)

    def forward(self, batched_inputs: list[dict[str, Any]]):
        """detectron2's model interface.

        Args:
            batched_inputs: N dicts of the dataset mapper, with "image" (3, H_i, W_i) and, in
                training, "instances".

        Returns:
            in training {name: scalar loss}, weighted; in evaluation the student's predictions.
        """
        if not self.training:
            return self.student(batched_inputs)
        self._check_trainer()
        images = [item["image"].to(self.device, non_blocking=True) for item in batched_inputs]
        inputs = [{**item, "image": image} for item, image in zip(batched_inputs, images)]
        losses = self._pretrain(inputs, images) if self.iteration < 0 else self._train(inputs, images)
        self._steps += 1
        return losses

    @property
    def iteration(self) -> int:
        """The student's iteration, negative while losses are pretrained; without a trainer, the
        number of training steps done."""
        steps = get_event_storage().iter if has_event_storage() else self._steps
        return steps - self.pretrain_iters

    def frozen_parameters(self, iteration: int) -> list[nn.Parameter]:
        """Parameters that stay as they are in this step: the trainer drops their gradients."""
        frozen = [p for loss in self.losses.values() for p in loss.frozen_parameters(iteration)]
        backbone = list(self.student.backbone.parameters())
        if iteration < 0:
            frozen += self.student.parameters()
            idle = [loss for loss in self.losses.values() if not _can_pretrain(loss)]
            return frozen + [p for loss in idle for p in loss.parameters()]
        if iteration < self.fix_backbone_before:
            frozen += backbone
        if iteration < self.fix_head_before:
            inside = set(backbone)
            frozen += [p for p in self.student.parameters() if p not in inside]
        return frozen

    def _train(
        self, inputs: list[dict[str, Any]], images: list[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        factors = {name: loss.factor(self.iteration) for name, loss in self.losses.items()}
        with self.student_view.recording(), self.teacher.view.recording():
            losses = self._weighted(self._task_losses(inputs), factors)
            if any(factors.values()):
                self._observe(images)
            batch = Batch(inputs, self._padded_size, self.iteration, self.max_iter)
            for name, loss in self.losses.items():
                _add(losses, self._distill_losses(loss, factors[name], batch), name)
        felt = (factors[name] and loss.distils(self.iteration) for name, loss in self.losses.items())
        if self.features_only and not all(felt):
            losses["loss_idle"] = self._zero()
        return losses

    def _observe(self, images: list[torch.Tensor]) -> None:
        flipped = [image.flip(0) for image in images] if self._flip else images
        self.teacher.observe(flipped, self._padded_size)

    def _task_losses(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if self.features_only:
            with self.student_view.until_read():
                self.student(inputs)
            return {}
        losses = dict(self.student(inputs))
        if self.task_loss_weight == 1.0:
            return losses
        return {name: loss * self.task_loss_weight for name, loss in losses.items()}

    def _weighted(
        self, task_losses: dict[str, torch.Tensor], factors: Mapping[str, float]
    ) -> dict[str, torch.Tensor]:
        """The student's own losses with the factors that losses which are on ask for."""
        for name, loss in self.losses.items():
            for term, weight in loss.task_weights().items() if factors[name] else ():
                if term in task_losses and weight != 1.0:
                    task_losses[term] = task_losses[term] * weight
        return task_losses

    def _distill_losses(self, loss: DistillLoss, factor: float, batch: Batch) -> dict[str, torch.Tensor]:
        if factor == 0.0:
            return loss.idle()
        with torch.autocast(self.device.type, enabled=False):  # law 7: always in float32
            terms = loss(self.student_view, self.teacher.view, batch)
        return {name: term * factor for name, term in terms.items()}

    # Pretraining: the losses learn from the teacher alone.

    def _pretrain(
        self, inputs: list[dict[str, Any]], images: list[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        terms: dict[str, torch.Tensor] = {}
        self._padded_size = self._size_without_forward(images)
        batch = Batch(inputs, self._padded_size, self.iteration, self.max_iter)
        with self.teacher.view.recording(), torch.autocast(self.device.type, enabled=False):
            self._observe(images)
            for name, loss in self.losses.items():
                _add(terms, loss.pretrain(self.teacher.view, batch), name)
        if not terms:
            raise ValueError(f"{self._pretrain_key()}, but no loss returned a term to pretrain with")
        first = next(iter(terms))
        terms[first] = terms[first] + self._zero()
        return terms

    def _zero(self) -> torch.Tensor:
        """A zero that reaches every parameter, so that DDP sees all of them."""
        return sum(p.sum() for p in self.parameters() if p.requires_grad) * 0.0

    def _size_without_forward(self, images: list[torch.Tensor]) -> tuple[int, int]:
        """The size to which the student would pad; detectron2's own rule, on tensors without data."""
        shapes = [torch.empty(image.shape, device="meta") for image in images]
        backbone = self.student.backbone
        padded = ImageList.from_tensors(
            shapes, backbone.size_divisibility, padding_constraints=backbone.padding_constraints
        )
        return self._common_size(*padded.tensor.shape[-2:])

    # What is trained.

    def _choose_trained(self, freeze_names: Sequence[str]) -> None:
        self._still_norms = freeze(self.student, freeze_names, "MODEL.DISTILLER.FREEZE")
        self.features_only = self.task_loss_weight == 0 and bool(self.student_view.backbone_reads)
        if self.features_only:
            freeze_unreached(self.student_view)
        if not any(p.requires_grad for p in self.student.parameters()):
            raise ValueError(
                f"MODEL.DISTILLER.FREEZE is {list(freeze_names)}, TASK_LOSS_WEIGHT {self.task_loss_weight} "
                f"and TYPES {list(self.losses)}: nothing of the student is left to train"
            )

    def train(self, mode: bool = True) -> Distiller:
        super().train(mode)
        for norm in self._still_norms:
            norm.eval()
        return self

    # What the configured phases ask of the losses and of the trainer.

    def _check_phases(self) -> None:
        negative = {key: value for key, value in self._phases().items() if value < 0}
        if negative:
            raise ValueError(f"{negative}: expected numbers of iterations, 0 or more")
        if self.pretrain_iters and not any(_can_pretrain(loss) for loss in self.losses.values()):
            raise ValueError(
                f"{self._pretrain_key()}, but none of the losses {list(self.losses)} can be "
                "pretrained; set it to 0, or add one that can to MODEL.DISTILLER.TYPES"
            )

    def _check_trainer(self) -> None:
        if self.trainer_has_phases:
            return
        asked = {key: value for key, value in self._phases().items() if value}
        if asked:
            raise RuntimeError(
                f"{asked}: this trainer cannot do that. Train with distill_d2.engine.DistillTrainer "
                "(train_distill.py), or set them to 0"
            )
        own = [name for name, loss in self.losses.items() if loss.solver is not None]
        if own and self._steps == 0:
            logger.warning(
                f"This trainer's one optimizer also trains the parameters of {own}; "
                "MODEL.DISTILLER.SOLVER is not used"
            )

    def _phases(self) -> dict[str, int]:
        return {
            "MODEL.DISTILLER.PRETRAIN_TEACHER_ITERS": self.pretrain_iters,
            "MODEL.DISTILLER.FIX_BACKBONE_BEFORE": self.fix_backbone_before,
            "MODEL.DISTILLER.FIX_HEAD_BEFORE": self.fix_head_before,
        }

    def _pretrain_key(self) -> str:
        return f"MODEL.DISTILLER.PRETRAIN_TEACHER_ITERS is {self.pretrain_iters}"

    # One common padding (law 6).

    def _pad_student(self, _backbone: nn.Module, inputs: tuple[torch.Tensor, ...]):
        """Note the padded size; pad further where the teacher needs a coarser multiple."""
        if not self.training:
            return None
        height, width = inputs[0].shape[-2:]
        self._padded_size = self._common_size(height, width)
        if self._padded_size == (height, width):
            return None
        missing = (self._padded_size[0] - height, self._padded_size[1] - width)
        return (F.pad(inputs[0], (0, missing[1], 0, missing[0])),)

    def _common_size(self, height: int, width: int) -> tuple[int, int]:
        divisibility, square = self.teacher.padding
        multiple = math.lcm(divisibility, max(self.student.backbone.size_divisibility, 1))
        height, width = max(height, square), max(width, square)
        if height % divisibility == 0 and width % divisibility == 0:
            return height, width
        return -(-height // multiple) * multiple, -(-width // multiple) * multiple

    def _check_fixed_size(self) -> None:
        size = self.student_view.fixed_size
        if size is None or self._common_size(size, size) == (size, size):
            return
        height, width = self._common_size(size, size)
        raise ValueError(
            f"the student, a {type(self.student).__name__}, takes images of {size}x{size} pixels only, but the "
            f"teacher, a {type(self.teacher.model).__name__}, would pad them to {height}x{width}; train the "
            f"student at a size that both take, such as {max(height, width)}"
        )

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
        return self.losses.state_dict(destination=state, prefix=prefix + _PREFIX, keep_vars=keep_vars)

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
        views = (self.student_view, self.teacher.view)
        multiple = max(self.student.backbone.size_divisibility, 1)
        sides = map(max, *(view.probe_size for view in views))
        size = self._common_size(*(-(-side // multiple) * multiple for side in sides))
        student, teacher = (view.probe(*size) for view in views)
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


def node_arguments(distiller: CfgNode, device: str, datasets: Sequence[str]) -> dict[str, Any]:
    """The arguments of Distiller that a MODEL.DISTILLER node decides.

    Args:
        device: of the teacher.
        datasets: names of the training datasets, for losses that use their statistics.
    """
    with separate_randomness():
        losses, teacher = build_losses(distiller), teacher_of(distiller, device)
    for loss in losses.values() if datasets else ():
        loss.use_statistics(lambda: box_statistics(datasets))
    return {
        "losses": losses,
        "teacher": teacher,
        "task_loss_weight": distiller.TASK_LOSS_WEIGHT,
        "preload_fpn": distiller.PRELOAD_FPN,
        "preload_head": distiller.PRELOAD_HEAD,
        "preload_names": distiller.PRELOAD_NAMES,
        "preload_teacher": distiller.PRELOAD_TEACHER,
        "preload_type": distiller.PRELOAD_TYPE,
        "pretrain_iters": distiller.PRETRAIN_TEACHER_ITERS,
        "fix_backbone_before": distiller.FIX_BACKBONE_BEFORE,
        "fix_head_before": distiller.FIX_HEAD_BEFORE,
        "freeze_names": distiller.FREEZE,
    }


def _bind(loss: DistillLoss, *views: DetectorView) -> None:
    """Bind a loss; of a detector about which it states nothing it may read all features."""
    before = [view.statements for view in views]
    loss.bind(*views)
    for view, count in zip(views, before):
        if view.statements == count:
            view.require_tap("backbone")


def _can_pretrain(loss: DistillLoss) -> bool:
    return type(loss).pretrain is not DistillLoss.pretrain


def _add(losses: dict[str, torch.Tensor], terms: dict[str, torch.Tensor], name: str) -> None:
    repeated = sorted(set(losses) & set(terms))
    if repeated:
        raise ValueError(f"the loss {name} returns terms {repeated}, which exist already")
    losses.update(terms)


@contextlib.contextmanager
def separate_randomness() -> Iterator[None]:
    """Draws inside leave the random numbers outside as train_baseline.py has them (law 1)."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield
