"""What a loss may know of the current training step besides the two detectors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch.nn.utils.rnn import pad_sequence

from ..upload import upload


@dataclass(frozen=True)
class Truth:
    """The ground truth of N images, padded to the largest number of boxes G, at least 1.

    Attributes:
        boxes: (N, G, 4) float32, absolute XYXY pixels on the augmented image; 0 in padding.
        classes: (N, G) int64; 0 in padding.
        valid: (N, G) bool; False in padding.
        counts: N numbers of boxes, on the host.
    """

    boxes: torch.Tensor
    classes: torch.Tensor
    valid: torch.Tensor
    counts: list[int]

    def to(self, device: torch.device) -> Truth:
        """The same on a device; the host does not wait for it."""
        boxes, classes, valid = (upload(part, device) for part in (self.boxes, self.classes, self.valid))
        return Truth(boxes, classes, valid, self.counts)


@dataclass(frozen=True)
class Batch:
    """One step's images and ground truth.

    Attributes:
        inputs: N dicts of detectron2's dataset mapper; "image" is (3, H_i, W_i) on the model's device.
        padded_size: (H, W) in pixels, to which both detectors padded all images (bottom and right).
        iteration: the step, counted from 0.
        max_iter: the number of steps of the whole run.
    """

    inputs: list[dict[str, Any]]
    padded_size: tuple[int, int]
    iteration: int
    max_iter: int

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.inputs[0]["image"].device

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """N (height, width) of the augmented images before padding, in pixels."""
        return [(item["image"].shape[-2], item["image"].shape[-1]) for item in self.inputs]

    @cached_property
    def truth(self) -> Truth:
        """The ground truth on the model's device; made once per step, so do not change it.

        Raises:
            KeyError: an image has no annotations (it is unlabeled).
        """
        return self._truth.to(self.device)

    @cached_property
    def truth_on_host(self) -> Truth:
        """The ground truth on the CPU; see ``truth``."""
        return self._truth.to(torch.device("cpu"))

    @cached_property
    def _truth(self) -> Truth:
        """The ground truth where the dataset mapper left it, usually on the CPU."""
        instances = [self._instances(item) for item in self.inputs]
        boxes = [per_image.gt_boxes.tensor.float() for per_image in instances]
        classes = [per_image.gt_classes for per_image in instances]
        counts = [len(per_image) for per_image in boxes]
        longest = max(1, *counts)
        valid = torch.stack([torch.arange(longest) < count for count in counts])
        return Truth(_padded(boxes, longest), _padded(classes, longest), valid, counts)

    def instances(self) -> list[Instances]:
        """``truth`` as N Instances with gt_boxes and gt_classes, for code of detectron2."""
        images = zip(self.image_sizes, self.truth.boxes, self.truth.classes, self.truth.counts)
        return [
            Instances(size, gt_boxes=Boxes(boxes[:count]), gt_classes=classes[:count])
            for size, boxes, classes, count in images
        ]

    def _instances(self, item: dict[str, Any]) -> Instances:
        if "instances" not in item:
            raise KeyError(
                f"image '{item.get('file_name', '')}' has no annotations ('instances'), which the losses "
                "need; leave unlabeled images out"
            )
        return item["instances"]


def _padded(parts: list[torch.Tensor], length: int) -> torch.Tensor:
    """N tensors (n_i, ...) as one (N, length, ...), with 0 in padding."""
    filled = [*parts, parts[0].new_zeros(length, *parts[0].shape[1:])]
    return pad_sequence(filled, batch_first=True)[:-1]
