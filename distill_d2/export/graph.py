"""A detector as a function of one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

INPUT = "image"
#: Names of the outputs, and the fields of Instances that they are.
OUTPUTS = {
    "boxes": "pred_boxes",
    "scores": "scores",
    "classes": "pred_classes",
    "masks": "pred_masks",
    "keypoints": "pred_keypoints",
}
#: What they are, for those who read a file.
MEANINGS = {
    "boxes": "(N, 4) float32: x0, y0, x1, y1 in pixels of the input",
    "scores": "(N,) float32, falling",
    "classes": "(N,) int64, numbers of the list of classes",
    "masks": "(N, H, W) bool, at the size of the input",
    "keypoints": "(N, K, 3) float32: x, y in pixels of the input, score",
}


class DetectorGraph(nn.Module):
    """From an image (3, H, W), float32, 0 to 255, in the detector's order of channels, to its N detections, as
    MEANINGS says.

    Attributes:
        names: of the outputs, in their order.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], threshold: float = 0.0):
        """
        Args:
            model: in eval.
            names: of OUTPUTS, those that the model has.
            threshold: detections with a lower score are left out.
        """
        super().__init__()
        self.model = model
        self.names = list(names)
        self.threshold = threshold
        self.eval()

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.model([{INPUT: image}])[0]["instances"]
        boxes, *others = (found.get(OUTPUTS[name]) for name in self.names)
        outputs = (boxes.tensor, *others)
        if self.threshold <= 0:
            return outputs
        kept = (outputs[1] >= self.threshold).nonzero()[:, 0]
        return tuple(output[kept] for output in outputs)


@torch.no_grad()
def graph_of(model: nn.Module, example: torch.Tensor, threshold: float = 0.0) -> DetectorGraph:
    """The graph of a detector.

    Args:
        model: in eval, on the device of the example.
        example: an input.

    Raises:
        ValueError: the model finds no boxes (a semantic segmentor).
    """
    output = model([{INPUT: example}])[0]
    if not isinstance(output, dict) or "instances" not in output:
        raise ValueError(
            f"a {type(model).__name__} finds no objects, so it cannot be exported as a graph; --format weights "
            "exports any model"
        )
    fields = output["instances"].get_fields()
    return DetectorGraph(model, [name for name, field in OUTPUTS.items() if field in fields], threshold)
