"""From the ground truth of a batch to queries for the decoder."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torchvision.ops import MLP

from ...views import Batch
from .descriptor import describe, descriptor_dim
from .sampling import GroundTruth, Queries, SlotSampler

_MIN_SIDE = 1e-3  # pixels; a box with a smaller side counts as one without area


class InstanceQueries(nn.Module):
    """Samples the slots of a batch and encodes them (ICD, NeurIPS 2021)."""

    def __init__(self, sampler: SlotSampler, classes: int, dim: int, with_scale: bool):
        """
        Args:
            sampler: chooses and places the fakes.
            classes: number of classes; dim: C, of the queries.
            with_scale: rough width and height are part of the description.
        """
        super().__init__()
        self.sampler = sampler
        self.classes = classes
        self.with_scale = with_scale
        self.encoder = MLP(descriptor_dim(classes, with_scale), [dim, dim, dim])

    def sample(self, batch: Batch, seed: int) -> Queries:
        """The slots of a batch; equal seeds give equal fakes.

        Raises:
            KeyError: an image has no annotations at all.
            ValueError: a class is not below ``classes``.
        """
        slots = self.sampler.sample(self.ground_truth(batch), np.random.default_rng(seed))
        return slots.to(batch.device)

    def forward(self, queries: Queries) -> torch.Tensor:
        """(N, K, C)."""
        return self.encoder(describe(queries, self.classes, self.with_scale))

    def ground_truth(self, batch: Batch) -> list[GroundTruth]:
        """Boxes and classes of N images, on the host; boxes without area are left out."""
        truth = batch.truth_on_host
        all_boxes, all_classes = truth.boxes.double().numpy(), truth.classes.numpy()
        images = []
        for index, (item, size, count) in enumerate(zip(batch.inputs, batch.image_sizes, truth.counts)):
            boxes, classes = all_boxes[index, :count], all_classes[index, :count]
            self._check_classes(classes, item)
            with_area = ((boxes[:, 2:] - boxes[:, :2]) > _MIN_SIDE).all(axis=1)
            images.append(GroundTruth(boxes[with_area], classes[with_area], size))
        return images

    def _check_classes(self, classes: np.ndarray, item: dict) -> None:
        if len(classes) and not 0 <= classes.min() <= classes.max() < self.classes:
            raise ValueError(
                f"image {item.get('file_name', '')} has instances of the classes "
                f"{sorted(set(classes.tolist()))}, but MODEL.DISTILLER.INS.NUM_CLASSES is "
                f"{self.classes} (classes 0 to {self.classes - 1})"
            )
