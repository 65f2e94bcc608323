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

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..views import Batch, DetectorView
from .base import DISTILL_LOSS_REGISTRY, DistillLoss
from .object_masks import FINEST_SCALE, LEVEL_ASSIGN, LEVEL_ASSIGNS, ObjectMasks
from .pairing import ADAPTER, INIT_STD, FeaturePairs
from .regions import distance_map, region_means
from .settings import LossSettings, key


@dataclass(frozen=True)
class FGFISettings(LossSettings):
    in_features: Sequence[str] = key(
        (), "Neck levels on which the student's head has anchors; empty: all common ones."
    )
    roi_phi: float = key(0.5, "Fraction of a box's largest IoU.", at_least=0, below=1)
    level_assign: str = key("single", LEVEL_ASSIGN, choices=LEVEL_ASSIGNS)
    finest_scale: float = key(56.0, FINEST_SCALE, above=0)
    adapter: bool = key(True, ADAPTER)
    adapter_kernel_size: int = key(3, "Side of the adapters' kernels.", at_least=1, odd=True)
    adapter_relu: bool = key(False, "A ReLU after each adapter.")
    adapter_init_std: float = key(0.0001, INIT_STD, at_least=0)
    weight: float = key(3.0, "Multiplies the loss.", at_least=0)


@DISTILL_LOSS_REGISTRY.register()
class FGFI(DistillLoss):
    """Fine-grained feature imitation; keys in MODEL.DISTILLER.FGFI."""

    NODE = "FGFI"
    Settings = FGFISettings
    settings: FGFISettings

    def __init__(self, **keys: Any):
        super().__init__(**keys)
        s = self.settings
        self.masks = ObjectMasks(
            "roi", level_assign=s.level_assign, finest_scale=s.finest_scale, threshold=s.roi_phi
        )
        self.pairs = FeaturePairs(
            s.in_features,
            kernel_size=s.adapter_kernel_size,
            always=s.adapter,
            relu=s.adapter_relu,
            init_std=s.adapter_init_std,
            key=self.config_key("in_features"),
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
            region_means(distance_map(s, t), masks[name], t.shape[1])[0]
            for name, (s, t) in pairs.items()
        ]
        return {"loss_fgfi": torch.stack(near).mean()}
