"""FGFI: fine-grained feature imitation, near objects only.

Wang et al., "Distilling Object Detectors with Fine-grained Feature Imitation", CVPR 2019,
arXiv 1906.03609. In the cells with an anchor whose IoU with a box exceeds ROI_PHI times the largest of
any anchor, the student's map, after an adapter, imitates the teacher's:

    L = mean over levels of sum(I (adapter(s) - t)^2) / max(1, 2 C sum(I)),   I the mask of cells

The paper has one level and neither C nor the mean: its weight of 0.01 is 2.56 here for C = 256. Several
levels are as in DeFeat's code, from which the default weight is: a box belongs to the one level of its
size, and the adapter has no ReLU (the paper's has one: ADAPTER_RELU), as features of an FPN have both
signs. The authors' code leaves the loss out in the first 400 iterations (START_ITER).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..views import Batch, DetectorView
from .base import (
    DISTILL_LOSS_REGISTRY,
    DistillLoss,
    check_choices,
    check_not_negative,
    check_odd,
    check_setting,
)
from .masks import LEVEL_ASSIGNS, ObjectMasks
from .pairing import FeaturePairs
from .regions import distance_map, region_means


@DISTILL_LOSS_REGISTRY.register()
class FGFI(DistillLoss):
    """Fine-grained feature imitation; keys in MODEL.DISTILLER.FGFI."""

    NODE = "FGFI"

    def __init__(
        self,
        *,
        in_features: Sequence[str] = (),
        roi_phi: float = 0.5,
        level_assign: str = "single",
        finest_scale: float = 56.0,
        adapter: bool = True,
        adapter_kernel_size: int = 3,
        adapter_relu: bool = False,
        adapter_init_std: float = 0.0001,
        weight: float = 3.0,
        **schedule,
    ):
        """
        Args:
            in_features: neck levels on which the student's head has anchors; empty: all common ones.
            roi_phi: part of a box's largest IoU, 0 to below 1.
            level_assign, finest_scale: see masks.ObjectMasks.
            adapter: a convolution on the student's levels even where channels agree; where they differ
                there is always one. adapter_kernel_size, adapter_relu, adapter_init_std: see FeaturePairs.
            weight: times the loss above.
            schedule: start_iter, stop_iter, warmup_iters of DistillLoss.

        Raises:
            ValueError: a value that cannot be; the message names the key.
        """
        super().__init__(weight=weight, **schedule)
        check_setting(self.NODE, "roi_phi", roi_phi, 0 <= roi_phi < 1, "0 to below 1")
        check_choices(self.NODE, level_assign=(level_assign, LEVEL_ASSIGNS))
        positive = 0 < finest_scale < math.inf
        check_setting(self.NODE, "finest_scale", finest_scale, positive, "a finite number above 0")
        check_not_negative(self.NODE, adapter_init_std=adapter_init_std)
        check_odd(self.NODE, adapter_kernel_size=adapter_kernel_size)
        self.masks = ObjectMasks(
            "roi", level_assign=level_assign, finest_scale=finest_scale, threshold=roi_phi
        )
        self.pairs = FeaturePairs(
            in_features,
            kernel_size=adapter_kernel_size,
            always=adapter,
            relu=adapter_relu,
            init_std=adapter_init_std,
            key="MODEL.DISTILLER.FGFI.IN_FEATURES",
        )

    def bind(self, student: DetectorView, teacher: DetectorView) -> None:
        super().bind(student, teacher)
        self.masks.bind(student, self.pairs.strides, self.pairs.key)

    def forward(
        self, student: DetectorView, teacher: DetectorView, batch: Batch
    ) -> dict[str, torch.Tensor]:
        """{"loss_fgfi": scalar}."""
        pairs = self.pairs(student, teacher)
        masks = self.masks.of_pairs(student, batch, pairs, self.pairs.strides)
        near = [
            region_means(distance_map(ours, theirs), masks[name], theirs.shape[1])[0]
            for name, (ours, theirs) in pairs.items()
        ]
        return {"loss_fgfi": torch.stack(near).mean()}
