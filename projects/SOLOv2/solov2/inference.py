"""From SOLOv2's outputs to instances (arXiv 2003.10152, section 3.3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.structures import Boxes, Instances

from distill_d2.tracing import is_recorded

from .chunks import masks_at_once
from .head import resize
from .losses import predict_masks
from .nms import mask_ious, mask_nms, matrix_nms

Size = tuple[int, int]

NMS_TYPES = ("matrix", "mask")
KERNELS = ("gaussian", "linear")


@dataclass(frozen=True)
class InstanceSelection:
    """Chooses an image's instances, and makes their masks.

    Attributes:
        score_threshold: class scores before NMS are above it.
        mask_threshold: of a mask's pixels; with nms_type "mask" also of the IoU.
        nms_type: of NMS_TYPES; nms_kernel: of KERNELS, with nms_sigma, for matrix NMS.
        pre_nms: the largest number of instances before NMS.
        update_threshold: scores after matrix NMS are not below it.
        max_instances: the largest number of detections.
    """

    score_threshold: float = 0.1
    mask_threshold: float = 0.5
    nms_type: str = "matrix"
    nms_kernel: str = "gaussian"
    nms_sigma: float = 2.0
    pre_nms: int = 500
    update_threshold: float = 0.05
    max_instances: int = 100

    def __call__(
        self,
        scores: torch.Tensor,
        kernels: torch.Tensor,
        smallest: torch.Tensor,
        features: torch.Tensor,
        sizes: Sequence[Size],
    ) -> Instances:
        """One image's instances, by falling score.

        Args:
            scores: (R, K) of all cells, after ``point_nms``; kernels: (R, D).
            smallest: (R,): the area of a mask, in cells of the features, is above it.
            features: (D, H, W) for the kernels, of the padded image.
            sizes: (H, W) of that image, of the image in it, and of the output.
        """
        scores, classes, kernels = self._candidates(scores, kernels, smallest, features)
        scores, order = scores.sort(descending=True, stable=True)
        scores, order = scores[: self.pre_nms], order[: self.pre_nms]
        classes, kernels = classes[order], kernels[order]
        masks = predict_masks(kernels, features)
        scores, order = self._suppress(scores, classes, masks > self.mask_threshold)
        found = Instances(sizes[-1], scores=scores, pred_classes=classes[order])
        found.pred_masks = self._full_size(masks[order], *sizes)
        found.pred_boxes = boxes_of(found.pred_masks)
        return found

    def _candidates(
        self,
        scores: torch.Tensor,
        kernels: torch.Tensor,
        smallest: torch.Tensor,
        features: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores (n,), classes (n,) and kernels (n, D) of cells whose class score and mask are large
        enough; scores are those of the class times those of the mask."""
        cell, classes = (scores > self.score_threshold).nonzero(as_tuple=True)
        kernels = kernels[cell]
        area, maskness = self._measure(kernels, features)
        scores = scores[cell, classes] * maskness
        large = area > smallest[cell]
        return scores[large], classes[large], kernels[large]

    def _measure(
        self, kernels: torch.Tensor, features: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of masks (n, H, W) the area and the mean inside it, each (n,); they are not kept."""
        areas, means = [], []
        at_once = masks_at_once(*features.shape[-2:])
        for part in [kernels] if is_recorded() else kernels.split(at_once):
            soft = predict_masks(part, features).flatten(1)
            inside = soft > self.mask_threshold
            areas.append(inside.sum(dim=1))
            means.append((soft * inside).sum(dim=1) / areas[-1].clamp(min=1))
        return torch.cat(areas), torch.cat(means)

    def _suppress(
        self, scores: torch.Tensor, classes: torch.Tensor, masks: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The scores (m,), falling, of instances that are left, and which they are."""
        ious = mask_ious(masks, classes)
        if self.nms_type == "mask":
            kept = mask_nms(ious, self.mask_threshold)
        else:
            scores = scores * matrix_nms(ious, self.nms_kernel, self.nms_sigma)
            kept = scores >= self.update_threshold
        (index,) = kept.nonzero(as_tuple=True)
        scores, order = scores[index].sort(descending=True, stable=True)
        return scores[: self.max_instances], index[order[: self.max_instances]]

    def _full_size(self, masks: torch.Tensor, padded: Size, image: Size, output: Size) -> torch.Tensor:
        """Soft masks (n, H, W) of the padded image as masks (n, H', W'), bool, of the output."""
        if is_recorded():  # without writing into a part of a tensor
            return self._enlarged(masks, padded, image, output)
        found = torch.zeros(len(masks), *output, dtype=torch.bool, device=masks.device)
        at_once = masks_at_once(*(max(sides) for sides in zip(padded, output)))
        for part, place in zip(masks.split(at_once), found.split(at_once)):
            if len(part):
                place[:] = self._enlarged(part, padded, image, output)
        return found

    def _enlarged(self, masks: torch.Tensor, padded: Size, image: Size, output: Size) -> torch.Tensor:
        whole = resize(masks[:, None], padded)[..., : image[0], : image[1]]
        return resize(whole, output)[:, 0] > self.mask_threshold


def boxes_of(masks: torch.Tensor) -> Boxes:
    """The boxes of masks (n, H, W), bool, as BitMasks.get_bounding_boxes has them, all at once."""
    sides = [masks.any(dim=1), masks.any(dim=2)]
    first = [side.byte().argmax(dim=1) for side in sides]
    last = [side.shape[1] - side.flip(1).byte().argmax(dim=1) for side in sides]
    boxes = torch.stack([*first, *last], dim=1).float()
    return Boxes(torch.where(sides[0].any(dim=1, keepdim=True), boxes, 0.0))
