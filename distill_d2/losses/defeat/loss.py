"""DeFeat: distillation of decoupled features, objects and background have separate weights.

Guo et al., "Distilling Object Detectors via Decoupled Features", CVPR 2021, arXiv 2103.14475. With I the
mask of the cells that ground-truth boxes cover, a the student's adapted map of a level, t the teacher's:

    L_neck = mean over levels of
        HINT_NECK_W      sum(I (a - t)^2) / max(1, 2 C sum(I))
      + HINT_NECK_BACK_W sum((1 - I) (a - t)^2) / max(1, 2 C sum(1 - I))

the same for backbone stages (HINT_BB_W, HINT_BB_BACK_W), and for the head's classes on common rows

    L_cls = HEAD_CLS_W      T^2 mean over objects of KL(t || s)
          + HEAD_CLS_BACK_W T^2 mean over the background of KL(t || s)

Formulas, names and defaults follow ggjy/DeFeat.pytorch; not yet checked against the paper. Its released
config has the neck only; for COCO its author names weights of 4 and 16. Sums are over the process's batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ...views import Batch, DetectorView
from ..base import DISTILL_LOSS_REGISTRY, DistillLoss
from ..heads import PROPOSALS, common_predictions, require_heads
from ..masks import resized, stage_mask
from ..object_masks import ObjectMasks
from ..pairing import FeaturePairs, Maps, Pairs
from ..regions import distance_map, region_means
from .classes import class_terms
from .settings import DeFeatSettings, decay_factor


@DISTILL_LOSS_REGISTRY.register()
class DeFeat(DistillLoss):
    """Decoupled features; keys in MODEL.DISTILLER.DEFEAT."""

    NODE = "DEFEAT"

    Settings = DeFeatSettings
    settings: DeFeatSettings

    def __init__(self, **keys: Any):
        super().__init__(**keys)
        s = self.settings
        self.capability = ""  # kind of head that is compared; known when bound
        pairs = partial(FeaturePairs, kernel_size=s.adapt_kernel_size, init_std=s.adapt_init_std)
        self.neck: FeaturePairs | None = None
        if s.hint_neck_w > 0 or s.hint_neck_back_w > 0:
            name = self.config_key("in_features")
            self.neck = pairs(s.in_features, always=s.neck_adapt, key=name)
        self.backbone: FeaturePairs | None = None
        if s.hint_bb_w > 0 or s.hint_bb_back_w > 0:
            name = self.config_key("bb_features")
            self.backbone = pairs(s.bb_features, always=s.bb_adapt, relu=True, key=name)
        self.masks = ObjectMasks(
            s.mask, level_assign=s.level_assign, finest_scale=s.finest_scale, threshold=s.roi_phi
        )

    @property
    def compares_heads(self) -> bool:
        """Whether the detectors' heads are needed at all."""
        s = self.settings
        return s.head_cls_w > 0 or (s.head_cls_back_w > 0 and s.head_cls_rows == "decouple")

    def bind(self, student: DetectorView, teacher: DetectorView) -> None:
        if self.feature_pairs():
            super().bind(student, teacher)
        if self.neck is not None:
            self.masks.bind(student, self.neck.strides, self.neck.key)
        if not self.compares_heads:
            return
        s = self.settings
        self.capability = s.predictions
        if s.predictions == "auto":
            self.capability = "dense" if "dense" in student.offers else "box_head"
        name = self.config_key("head_cls_w")
        for source in self._sources():
            require_heads(student, teacher, self.capability, name, proposals=source, boxes=False)
        if self.capability == "dense":
            fits = s.head_cls_rows in ("decouple", "all")
            self.check_setting("head_cls_rows", fits, "decouple or all, where heads are dense")
            expected = "student, where heads are dense and have no proposals"
            self.check_setting("proposals", s.proposals == "student", expected)

    def forward(
        self, student: DetectorView, teacher: DetectorView, batch: Batch
    ) -> dict[str, torch.Tensor]:
        """The terms whose weights are not 0, weighted: "loss_defeat_neck", "loss_defeat_neck_back"; of
        the backbone "..._bb", "..._bb_back"; of the head's classes "..._hcls", "..._hcls_back"; and, on
        the teacher's proposals beside the student's, "..._hcls_teacher", "..._hcls_back_teacher"."""
        terms: dict[str, torch.Tensor] = {}
        terms.update(self.neck_terms(student, teacher, batch))
        terms.update(self.backbone_terms(student, teacher, batch))
        if self.compares_heads:
            terms.update(self.head_terms(student, teacher, batch))
        factor = decay_factor(self.settings.decay, batch)
        return {f"loss_defeat_{name}": term * factor for name, term in terms.items()}

    # Features.

    def neck_terms(
        self, student: DetectorView, teacher: DetectorView, batch: Batch
    ) -> dict[str, torch.Tensor]:
        """The terms of the neck, weighted, by name; none where both weights are 0."""
        if self.neck is None:
            return {}
        pairs = self.neck(student, teacher)
        masks = self.masks.of_pairs(student, batch, pairs, self.neck.strides)
        weights = {"neck": self.settings.hint_neck_w, "neck_back": self.settings.hint_neck_back_w}
        return self._decoupled(pairs, masks, weights)

    def backbone_terms(
        self, student: DetectorView, teacher: DetectorView, batch: Batch
    ) -> dict[str, torch.Tensor]:
        """The terms of backbone stages, weighted, by name; none where both weights are 0."""
        if self.backbone is None:
            return {}
        pairs = self.backbone(student, teacher)
        grid = stage_mask(batch)
        masks = {name: resized(grid, (t.shape[-2], t.shape[-1])) for name, (_, t) in pairs.items()}
        weights = {"bb": self.settings.hint_bb_w, "bb_back": self.settings.hint_bb_back_w}
        return self._decoupled(pairs, masks, weights)

    def _decoupled(
        self, pairs: Pairs, masks: Maps, weights: dict[str, float]
    ) -> dict[str, torch.Tensor]:
        """The two terms, by name with their weights, of maps and masks by level."""
        form, inverted = self.settings.loss_form, self.settings.reference_bugs
        means = [
            region_means(distance_map(s, t, form, inverted=inverted), masks[name], t.shape[1])
            for name, (s, t) in pairs.items()
        ]
        return {
            name: weight * torch.stack(values).mean()
            for (name, weight), values in zip(weights.items(), zip(*means))
            if weight > 0
        }

    # Classes.

    def _sources(self) -> Sequence[str]:
        chosen = self.settings.proposals
        return PROPOSALS if chosen == "both" else (chosen,)

    def head_terms(
        self, student: DetectorView, teacher: DetectorView, batch: Batch
    ) -> dict[str, torch.Tensor]:
        """The terms of the head's classes, weighted, by name."""
        terms = {}
        for source in self._sources():
            rows = common_predictions(student, teacher, self.capability, batch, source)
            suffix = "_teacher" if source != self._sources()[0] else ""
            for name, term in class_terms(*rows, batch, self.settings).items():
                terms[name + suffix] = term
        return terms
