"""The two-stage detectors' view: scores of given boxes."""

from __future__ import annotations

from typing import List, Tuple

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from detectron2.structures import Boxes

from .base import DetectorView, register_view


@register_view(GeneralizedRCNN)
class RCNNView(DetectorView):
    @property
    def offers(self) -> Tuple[str, ...]:
        heads = self.model.roi_heads
        one_predictor = isinstance(heads, StandardROIHeads) and not isinstance(heads, CascadeROIHeads)
        return ("score_boxes",) if one_predictor else ()

    @property
    def num_classes(self) -> int:
        return self.model.roi_heads.num_classes

    def score_boxes(self, boxes: List[Boxes]) -> Tuple[List[torch.Tensor], List[torch.Tensor]]:
        """Run the box head on N images' boxes (absolute XYXY pixels on the augmented image).

        Returns:
            per image, class logits (R_i, K + 1), background last, and deltas (R_i, 4K) or (R_i, 4).
        """
        heads = self.model.roi_heads
        features = [self.features[name] for name in heads.box_in_features]
        with self.context():
            pooled = heads.box_pooler(features, boxes)
            logits, deltas = heads.box_predictor(heads.box_head(pooled))
        counts = [len(per_image) for per_image in boxes]
        return list(logits.float().split(counts)), list(deltas.float().split(counts))
