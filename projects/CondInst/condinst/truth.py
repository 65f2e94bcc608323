"""Ground-truth masks as CondInst reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, Instances, PolygonMasks
from detectron2.structures.masks import polygons_to_bitmask
from fvcore.nn import sigmoid_focal_loss_jit

from distill_d2.upload import upload


class MaskTruth(NamedTuple):
    """Mask targets of an image's G objects.

    Attributes:
        masks: (G, H / stride, W / stride) float, at the resolution of predicted masks.
        centers: (G, 2) centers of mass, x, y in pixels; (0, 0) of an empty mask.
        classes: (H / s, W / s) int64, at the mask branch's resolution: the class of the smallest object
            on each pixel, or K.
    """

    masks: torch.Tensor
    centers: torch.Tensor
    classes: torch.Tensor


@torch.no_grad()
def mask_truth(
    objects: Instances, size: Sequence[int], out_stride: int, in_stride: int, num_classes: int
) -> MaskTruth | None:
    """Of one image, or None if its objects have no masks.

    Args:
        objects: with gt_classes and gt_masks, polygons or bit masks; without objects it needs no masks.
        size: height and width in pixels of the padded images, divisible by the strides.
        out_stride: of the masks; in_stride: of the classes, in pixels.

    Raises:
        TypeError: masks of another kind.
    """
    if len(objects) and not objects.has("gt_masks"):
        return None
    device = objects.gt_classes.device
    full = _full(objects, size)
    kinds = objects.gt_classes.to(full.device)
    of_columns, of_rows = _sum(full, 1), _sum(full, 2)
    areas = of_columns.sum(dim=1)
    parts = (
        _sampled(full, out_stride).float(),
        torch.stack([_mean(counts, areas) for counts in (of_columns, of_rows)], dim=1),
        _classes(_sampled(full, in_stride), areas, kinds, num_classes),
    )
    return MaskTruth(*(upload(part, device) for part in parts))


def _full(objects: Instances, size: Sequence[int]) -> torch.Tensor:
    """(G, H, W) bool; of polygons on the CPU, of bit masks where they are."""
    height, width = size
    if not len(objects):
        return torch.zeros(0, height, width, dtype=torch.bool, device=objects.gt_classes.device)
    masks = objects.gt_masks
    if isinstance(masks, PolygonMasks):
        rows = [polygons_to_bitmask(polygons, height, width) for polygons in masks.polygons]
        return torch.from_numpy(np.stack(rows)).bool()
    if isinstance(masks, BitMasks):
        bits = masks.tensor
        return F.pad(bits, (0, width - bits.shape[-1], 0, height - bits.shape[-2]))
    raise TypeError(
        f"gt_masks are {type(masks).__name__}; CondInst reads PolygonMasks and BitMasks "
        "(INPUT.MASK_FORMAT 'polygon' or 'bitmask')"
    )


def _sampled(full: torch.Tensor, stride: int) -> torch.Tensor:
    return full[:, stride // 2 :: stride, stride // 2 :: stride]


def _sum(masks: torch.Tensor, dim: int) -> torch.Tensor:
    """Numbers of pixels, float32; on a CPU numpy's sum of bytes is ten times faster than torch's."""
    if masks.is_cuda:
        return masks.sum(dim=dim, dtype=torch.float32)
    return torch.from_numpy(masks.numpy().sum(axis=dim)).float()


def _mean(counts: torch.Tensor, areas: torch.Tensor) -> torch.Tensor:
    """(G,) mean index, weighted with (G, length) pixels."""
    indices = torch.arange(counts.shape[1], dtype=torch.float32, device=counts.device)
    return counts @ indices / areas.clamp(min=1e-6)


def _classes(
    masks: torch.Tensor, areas: torch.Tensor, kinds: torch.Tensor, num_classes: int
) -> torch.Tensor:
    nothing = torch.full(masks.shape[1:], num_classes, dtype=torch.int64, device=masks.device)
    if not len(masks):
        return nothing
    smallest, index = torch.where(masks, areas[:, None, None], torch.inf).min(dim=0)
    return torch.where(smallest < torch.inf, kinds[index], nothing)


def semantic_loss(
    logits: torch.Tensor, truths: Sequence[MaskTruth | None], alpha: float, gamma: float
) -> torch.Tensor:
    """Focal loss of the semantic segmentation (N, K, H, W), over the number of pixels on an object;
    images whose objects have no masks are left out."""
    known = [index for index, truth in enumerate(truths) if truth is not None]
    if not known:
        return logits.float().sum() * 0.0
    # No copy if all masks are known, as always except with mixed data.
    logits = (logits if len(known) == len(logits) else torch.stack([logits[i] for i in known])).float()
    classes: list[torch.Tensor] = [truths[i].classes for i in known]
    kinds = torch.arange(logits.shape[1], device=logits.device)[:, None, None]
    target = (torch.stack(classes)[:, None] == kinds).to(logits.dtype)
    loss = sigmoid_focal_loss_jit(logits, target, alpha, gamma, reduction="sum")
    return loss / target.sum().clamp(min=1)
