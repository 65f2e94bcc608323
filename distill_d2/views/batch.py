"""What a loss may know of the current training step besides the two detectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from detectron2.structures import Instances
from torch.nn.utils.rnn import pad_sequence

from ..upload import upload


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
    def image_sizes(self) -> list[tuple[int, int]]:
        """N (height, width) of the augmented images before padding, in pixels."""
        return [tuple(item["image"].shape[-2:]) for item in self.inputs]

    @property
    def instances(self) -> list[Instances]:
        """N ground truths: gt_boxes (absolute XYXY on the augmented image), gt_classes, ...

        Raises:
            KeyError: an image has no annotations (it is unlabelled).
        """
        device = self.inputs[0]["image"].device
        return [item["instances"].to(device) for item in self.inputs]

    def padded_boxes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The ground-truth boxes (N, G, 4), float32, absolute XYXY on the augmented image, filled up to
        the longest image's, at least one; and which are there, (N, G) bool.

        Raises:
            KeyError: an image has no annotations (it is unlabelled).
        """
        boxes = [item["instances"].gt_boxes.tensor.float() for item in self.inputs]
        longest = max(1, *(len(per_image) for per_image in boxes))
        valid = torch.stack([torch.arange(longest) < len(per_image) for per_image in boxes])
        padded = pad_sequence([*boxes, boxes[0].new_zeros(longest, 4)], batch_first=True)[:-1]
        device = self.inputs[0]["image"].device
        return upload(padded, device), upload(valid, device)
