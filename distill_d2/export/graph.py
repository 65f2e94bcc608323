"""A detector as a function of one tensor."""

from __future__ import annotations

import torch
from torch import nn

INPUT = "image"
#: Names of the outputs, and the fields of Instances they come from.
OUTPUTS = {
    "boxes": "pred_boxes",
    "scores": "scores",
    "classes": "pred_classes",
    "masks": "pred_masks",
    "keypoints": "pred_keypoints",
}


class DetectorGraph(nn.Module):
    """From an image (3, H, W), float32, 0 to 255, in the detector's order of channels, to its N detections by
    falling score: boxes (N, 4), absolute XYXY in pixels of that image; scores (N,); classes (N,), int64; of a
    detector that has them masks (N, H, W), bool, and keypoints (N, K, 3), x, y and score.

    Attributes:
        names: of the outputs, in their order.
    """

    def __init__(self, model: nn.Module, names: list[str], threshold: float = 0.0):
        """
        Args:
            model: in eval.
            names: of OUTPUTS, those that the model has.
            threshold: detections with lower scores are left out.
        """
        super().__init__()
        self.model = model
        self.names = names
        self.threshold = threshold
        self.eval()

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.model([{"image": image}])[0]["instances"]
        outputs = [getattr(found, OUTPUTS[name]) for name in self.names]
        outputs[0] = outputs[0].tensor
        if self.threshold > 0:
            (kept,) = (outputs[1] >= self.threshold).nonzero().unbind(1)
            outputs = [output[kept] for output in outputs]
        return tuple(outputs)
