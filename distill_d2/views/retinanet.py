"""RetinaNet's view: dense predictions over anchors."""

from __future__ import annotations

import torch
from detectron2.modeling import RetinaNet
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K

from .base import DetectorView, register_view
from .dense import DensePredictions


@register_view(RetinaNet)
class RetinaNetView(DetectorView):
    offers = ("dense",)

    @property
    def num_classes(self) -> int:
        return self.model.num_classes

    def require(self, capability: str) -> None:
        super().require(capability)
        self.taps.add("head")

    def dense(self) -> DensePredictions:
        """The head's predictions; the teacher's head runs here, the student's has run already."""
        features = [self.features[name] for name in self.model.head_in_features]
        if not self.taps.has("head"):
            with self.context():
                self.model.head(features)  # its tap remembers the outputs
        logits, deltas = self.tap("head")
        anchors = self.model.anchor_generator(features)
        logits = [permute_to_N_HWA_K(level, self.num_classes) for level in logits]
        transform = self.model.box2box_transform

        def decode(deltas: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
            flat = transform.apply_deltas(deltas.reshape(-1, 4), anchors.reshape(-1, 4))
            return flat.view_as(deltas)

        return DensePredictions(
            logits=torch.cat(logits, dim=1),
            deltas=torch.cat([permute_to_N_HWA_K(level, 4) for level in deltas], dim=1),
            anchors=torch.cat([boxes.tensor for boxes in anchors]),
            level_sizes=[level.shape[1] for level in logits],
            decode=decode,
        )
