"""SSDKD: learning efficient object detectors with knowledge distillation.

Chen et al., "Learning Efficient Object Detection Models with Knowledge Distillation", NIPS 2017,
equations 1 to 6, on SSD and on two-stage detectors (RPN and box head); the formulas are
recalled and not yet checked against the paper:

    L_cls = mu L_hard + (1 - mu) L_soft      L_reg = smooth L1 + nu L_b      L_hint = |V - Z|^2
    L     = L_cls + lambda L_reg + gamma L_hint

L_hard and smooth L1 are the student's own losses, whose weights become mu and lambda while this loss is
on. L_soft is a cross entropy with the teacher's probabilities, in which the background weighs more; L_b
the squared distance of boxes to the ground truth where the student is not better than the teacher by a
margin; L_hint compares features through 1x1 convolutions.

SSD: rows are objects and hard negatives of the student, and sums are divided by the number of objects.
RPN: the mean of BATCH_SIZE_PER_IMAGE sampled anchors is replaced by its expected value over the
sampling. Box head: the mean over the student's sampled proposals.

The repository SSD-Knowledge-Distillation computes something else under the same name: one bound for the
whole batch (BOUNDED batch) and a mean squared error of logits as hint (HINT logits).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...views import Batch, DetectorView, Predictions
from ..base import DISTILL_LOSS_REGISTRY, DistillLoss
from ..heads import common_predictions, require_heads
from ..pairing import FeaturePairs
from ..settings import LossSettings, key
from .terms import (
    mean_of_rows,
    per_batch_bound,
    per_box_bound,
    selected_rows,
    soft_cross_entropy,
    targets_of,
)

_KEY = "MODEL.DISTILLER.SSD_KD"
_BOUNDS = {"box": per_box_bound, "batch": per_batch_bound}
_HINT_FORMS = {"L2": torch.square, "L1": torch.abs}


@dataclass(frozen=True)
class SSDKDSettings(LossSettings):
    mu: float = key(
        0.5,
        "Weight of the student's own class losses; 1 - MU is that of the soft ones (1: none).",
        at_least=0,
        at_most=1,
    )
    background_weight: float = key(1.5, "w_c of the background in the soft losses.", at_least=0)
    object_weight: float = key(1.0, "w_c of the other classes in the soft losses.", at_least=0)
    temperature: float = key(1.0, "Divides the logits.", above=0)
    lmda: float = key(
        1.0, "lambda: weight of the student's own box losses and of the bounded one.", at_least=0
    )
    nu: float = key(0.5, "Weight of the bounded regression (0: none).", at_least=0)
    margin: float = key(0.0, "m of the bounded regression.")
    bounded: str = key("box", "The bound holds for each box, or once for the batch.", choices=_BOUNDS)
    gamma: float = key(0.5, "Weight of the hint (0: none).", at_least=0)
    hint: str = key("feature", "Compare features or logits.", choices=("feature", "logits"))
    hint_form: str = key("L2", "Distance of the hint, a mean over elements.", choices=_HINT_FORMS)
    in_features: Sequence[str] = key((), "Levels of the hint; empty: all common neck levels.")
    negatives_per_positive: float = key(3.0, "Number of SSD's hard negatives per object.", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        computes = self.mu < 1 or self.nu > 0 or self.gamma > 0
        self.require("mu", computes, "below 1, or NU or GAMMA above 0")


@DISTILL_LOSS_REGISTRY.register()
class SSDKD(DistillLoss):
    """Chen et al.'s three losses; keys in MODEL.DISTILLER.SSD_KD."""

    NODE = "SSD_KD"
    Settings = SSDKDSettings
    settings: SSDKDSettings

    def __init__(self, **keys: Any):
        super().__init__(**keys)
        s = self.settings
        self.hint = s.hint if s.gamma > 0 else ""
        self.distance = _HINT_FORMS[s.hint_form]
        self.heads: list[str] = []
        # Anchors that an RPN samples per image, and how many of them are objects at most.
        self._samples: tuple[int, int] = (0, 0)
        self.pairs: FeaturePairs | None = None
        if self.hint == "feature":
            name = self.config_key("in_features")
            self.pairs = FeaturePairs(s.in_features, always=True, key=name)

    def bind(self, student: DetectorView, teacher: DetectorView) -> None:
        if self.pairs is not None:
            super().bind(student, teacher)
        self.task_weights = {
            **dict.fromkeys(student.class_losses, self.settings.mu),
            **dict.fromkeys(student.box_losses, self.settings.lmda),
        }
        if not self.compares_rows and self.hint != "logits":
            return  # features alone
        self.heads = ["rpn", "box_head"] if "box_head" in student.offers else ["dense"]
        for capability in self.heads:
            require_heads(student, teacher, capability, _KEY)
        if self.heads == ["dense"] and not (student.has_background and teacher.has_background):
            kinds = " and ".join(type(view.model).__name__ for view in (student, teacher))
            raise ValueError(
                f"{_KEY}: {kinds} are not both SSDs, nor two-stage detectors: the loss compares classes "
                "with a background"
            )
        if "rpn" in self.heads:
            rpn: Any = student.model.proposal_generator
            self._samples = (
                rpn.batch_size_per_image,
                int(rpn.batch_size_per_image * rpn.positive_fraction),
            )

    @property
    def compares_rows(self) -> bool:
        """Whether the soft or the bounded terms are on."""
        return self.settings.mu < 1 or self.settings.nu > 0

    def forward(
        self, student: DetectorView, teacher: DetectorView, batch: Batch
    ) -> dict[str, torch.Tensor]:
        """The weighted terms that are on: "loss_ssd_kd_soft", "..._bounded", "..._hint"; of two-stage
        detectors the first two also with "_rpn"."""
        terms: dict[str, torch.Tensor] = {}
        for head in self.heads if self.compares_rows else ():
            pair = common_predictions(student, teacher, head, batch)
            suffix = "_rpn" if head == "rpn" else ""
            terms.update((f"{name}{suffix}", term) for name, term in self._head(head, *pair, batch))
        if self.hint:
            terms["loss_ssd_kd_hint"] = self.settings.gamma * self._hint(student, teacher)
        return terms

    def _head(
        self, head: str, student: Predictions, teacher: Predictions, batch: Batch
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The soft and the bounded term of one head, weighted, by name."""
        s = self.settings
        objects, background, classes, deltas = targets_of(student, batch)
        weights = self._row_weights(head, student, objects, background, classes)
        count = self._count(head, student, objects)
        if s.mu < 1:
            losses = soft_cross_entropy(
                student.logits / s.temperature,
                teacher.logits / s.temperature,
                s.object_weight,
                s.background_weight,
            )
            yield "loss_ssd_kd_soft", (1 - s.mu) * (losses * weights).sum() / count
        if s.nu > 0:
            student_error = student.deltas_of(classes) - deltas
            teacher_error = teacher.deltas_of(classes) - deltas
            bound = _BOUNDS[s.bounded](student_error, teacher_error, weights * objects, s.margin)
            yield "loss_ssd_kd_bounded", s.lmda * s.nu * bound / count

    def _row_weights(
        self,
        head: str,
        student: Predictions,
        objects: torch.Tensor,
        background: torch.Tensor,
        classes: torch.Tensor,
    ) -> torch.Tensor:
        """(N, R): the weight of each row."""
        if head == "dense":
            return selected_rows(student, objects, classes, self.settings.negatives_per_positive)
        if head == "box_head":
            return objects | background
        sampled, most = self._samples
        positive = objects.sum(dim=1, keepdim=True)
        taken = positive.clamp(max=most)
        negative = background.sum(dim=1, keepdim=True)
        # All negatives are taken if they are fewer than the free places.
        of_negative = ((sampled - taken) / negative.clamp(min=1)).clamp(max=1)
        return objects * (taken / positive.clamp(min=1)) + background * of_negative

    def _count(self, head: str, student: Predictions, objects: torch.Tensor) -> torch.Tensor:
        """The number that divides sums over rows, as in the detector's own losses."""
        if head == "dense":
            return objects.sum().clamp(min=1)
        if head == "box_head":
            return student.row_mask.sum().clamp(min=1)
        return objects.new_full((), self._samples[0] * len(objects), dtype=torch.float32)

    def _hint(self, student: DetectorView, teacher: DetectorView) -> torch.Tensor:
        if self.pairs is not None:
            maps = self.pairs(student, teacher).values()
            return torch.stack([self.distance(s - t).mean() for s, t in maps]).sum()
        heads = [common_predictions(student, teacher, head) for head in self.heads]
        distances = [(self.distance(s.logits - t.logits), s.valid) for s, t in heads]
        return torch.stack([mean_of_rows(*pair) for pair in distances]).sum()
