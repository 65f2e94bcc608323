"""DeFeat: distillation of decoupled features, objects and background each with a weight of its own.

Guo et al., "Distilling Object Detectors via Decoupled Features", CVPR 2021, arXiv 2103.14475. With I the
mask of the cells that ground-truth boxes cover, of each level a (an adapted map of the student's) and t:

    L_neck = mean over levels of
        HINT_NECK_W      sum(I (a - t)^2) / max(1, 2 C sum(I))
      + HINT_NECK_BACK_W sum((1 - I) (a - t)^2) / max(1, 2 C sum(1 - I))

the same of backbone stages (HINT_BB_W, HINT_BB_BACK_W), and of the head's classes on common rows

    L_cls = HEAD_CLS_W      T^2 mean over objects of KL(t || s)
          + HEAD_CLS_BACK_W T^2 mean over the background of KL(t || s)

The paper was not at hand: formulas, names and defaults are those of ggjy/DeFeat.pytorch, whose released
config has the neck alone; for COCO its author names weights of 4 and 16. Sums are of the process's batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch

from ...views import Batch, DetectorView
from ..base import DISTILL_LOSS_REGISTRY, DistillLoss, check_setting, keyword_defaults
from ..heads import PROPOSALS, common_predictions, require_heads
from ..masks import ObjectMasks, resized, stage_mask
from ..pairing import FeaturePairs, Maps, Pairs
from ..regions import distance_map, region_means
from .classes import class_terms
from .settings import check_settings, decay_factor


@DISTILL_LOSS_REGISTRY.register()
class DeFeat(DistillLoss):
    """Decoupled features; keys in MODEL.DISTILLER.DEFEAT."""

    NODE = "DEFEAT"

    def __init__(
        self,
        *,
        in_features: Sequence[str] = (),
        hint_neck_w: float = 3.0,
        hint_neck_back_w: float = 12.0,
        mask: str = "gt",
        level_assign: str = "single",
        finest_scale: float = 56.0,
        roi_phi: float = 0.5,
        loss_form: str = "L2",
        neck_adapt: bool = True,
        bb_features: Sequence[str] = ("res3", "res4", "res5"),
        hint_bb_w: float = 0.0,
        hint_bb_back_w: float = 0.0,
        bb_adapt: bool = False,
        adapt_kernel_size: int = 3,
        adapt_init_std: float = 0.0001,
        head_cls_w: float = 0.0,
        head_cls_back_w: float = 0.0,
        head_cls_t: float = 1.0,
        head_cls_back_t: float = 1.0,
        head_cls_rows: str = "decouple",
        predictions: str = "auto",
        proposals: str = "student",
        decay: str = "none",
        reference_bugs: bool = False,
        **schedule,
    ):
        """
        Args:
            in_features: neck levels; empty: all common ones.
            hint_neck_w, hint_neck_back_w: weights of the neck in objects and in the background.
            mask: what of a neck level is objects: cells of ground-truth boxes ("gt"), cells with an
                anchor near one ("roi", with roi_phi: FGFI's), Gaussians in them ("gaussian"), or all
                ("one"). level_assign, finest_scale, roi_phi: see masks.ObjectMasks.
            loss_form: of neck and backbone, "L2", "L1" or "smoothL1".
            neck_adapt: a convolution on the student's levels even where channels agree; where they differ
                there is always one.
            bb_features: backbone stages, with weights hint_bb_w and hint_bb_back_w; bb_adapt: as
                neck_adapt, with a ReLU.
            adapt_kernel_size, adapt_init_std: of the convolutions, see FeaturePairs.
            head_cls_w, head_cls_back_w: weights of the class terms; head_cls_t, head_cls_back_t: their
                temperatures T.
            head_cls_rows: "decouple" objects and background; or one term, with head_cls_w, of "all"
                rows, of those whose class the teacher has "correct", or of objects of these ("cfore").
            predictions: "dense" (RetinaNet, FCOS: a sigmoid per class) or "box_head" (proposals: a
                softmax); "auto": what the student has.
            proposals: whose the box heads score: "student", "teacher", or "both" in turn.
            decay: all terms times a factor that falls over the run: "linear" from 1 to 0, "cos", or
                "up-down" from 1 to 2 in the first quarter, then to 0.
            reference_bugs: "smoothL1" inverted, as the authors' code has it.
            schedule: weight, start_iter, stop_iter, warmup_iters of DistillLoss.

        A term with weight 0 is not computed, nor what it alone needs.

        Raises:
            ValueError: a value that cannot be; the message names the key.
        """
        settings = {key: value for key, value in locals().items() if key in keyword_defaults(DeFeat)}
        super().__init__(**schedule)
        self.settings = SimpleNamespace(**settings)
        check_settings(self.NODE, settings)
        self.capability = ""  # of the views, from which classes come: known when bound
        self.neck = self.backbone = None
        node = f"MODEL.DISTILLER.{self.NODE}"
        adapters = {"kernel_size": adapt_kernel_size, "init_std": adapt_init_std}
        if hint_neck_w > 0 or hint_neck_back_w > 0:
            key = f"{node}.IN_FEATURES"
            self.neck = FeaturePairs(in_features, always=neck_adapt, key=key, **adapters)
        if hint_bb_w > 0 or hint_bb_back_w > 0:
            key = f"{node}.BB_FEATURES"
            self.backbone = FeaturePairs(bb_features, always=bb_adapt, relu=True, key=key, **adapters)
        self.masks = ObjectMasks(
            mask, level_assign=level_assign, finest_scale=finest_scale, threshold=roi_phi
        )

    @property
    def compares_heads(self) -> bool:
        """Whether the detectors' heads are needed at all."""
        s = self.settings
        return s.head_cls_w > 0 or (s.head_cls_back_w > 0 and s.head_cls_rows == "decouple")

    def bind(self, student: DetectorView, teacher: DetectorView) -> None:
        super().bind(student, teacher)
        if self.neck is not None:
            self.masks.bind(student, self.neck.strides, self.neck.key)
        if not self.compares_heads:
            return
        s, key = self.settings, "MODEL.DISTILLER.DEFEAT.HEAD_CLS_W"
        self.capability = s.predictions
        if s.predictions == "auto":
            self.capability = "dense" if "dense" in student.offers else "box_head"
        for source in self._sources():
            require_heads(student, teacher, self.capability, key, proposals=source, boxes=False)
        if self.capability == "dense":
            fits = s.head_cls_rows in ("decouple", "all")
            expected = "decouple or all, where heads are dense"
            check_setting(self.NODE, "head_cls_rows", s.head_cls_rows, fits, expected)
            expected = "student, where heads are dense and have no proposals"
            check_setting(self.NODE, "proposals", s.proposals, s.proposals == "student", expected)

    def forward(
        self, student: DetectorView, teacher: DetectorView, batch: Batch
    ) -> dict[str, torch.Tensor]:
        """The terms whose weights are not 0, weighted: "loss_defeat_neck", "loss_defeat_neck_back"; of
        the backbone "..._bb", "..._bb_back"; of the head's classes "..._hcls", "..._hcls_back"; and, on
        the teacher's proposals beside the student's, "..._hcls_teacher", "..._hcls_back_teacher"."""
        terms: dict[str, torch.Tensor] = {}
        if self.neck is not None:
            terms.update(self.neck_terms(student, teacher, batch))
        if self.backbone is not None:
            terms.update(self.backbone_terms(student, teacher, batch))
        if self.compares_heads:
            terms.update(self.head_terms(student, teacher, batch))
        factor = decay_factor(self.settings.decay, batch)
        return {f"loss_defeat_{name}": term * factor for name, term in terms.items()}

    # Features.

    def neck_terms(
        self, student: DetectorView, teacher: DetectorView, batch: Batch
    ) -> dict[str, torch.Tensor]:
        pairs = self.neck(student, teacher)
        masks = self.masks.of_pairs(student, batch, pairs, self.neck.strides)
        weights = {"neck": self.settings.hint_neck_w, "neck_back": self.settings.hint_neck_back_w}
        return self._decoupled(pairs, masks, weights)

    def backbone_terms(
        self, student: DetectorView, teacher: DetectorView, batch: Batch
    ) -> dict[str, torch.Tensor]:
        pairs = self.backbone(student, teacher)
        grid = stage_mask(batch)
        masks = {name: resized(grid, theirs.shape[-2:]) for name, (_, theirs) in pairs.items()}
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
        terms = {}
        for source in self._sources():
            ours, theirs = common_predictions(student, teacher, self.capability, batch, source)
            suffix = "_teacher" if source != self._sources()[0] else ""
            for name, term in class_terms(ours, theirs, batch, self.settings).items():
                terms[name + suffix] = term
        return terms
