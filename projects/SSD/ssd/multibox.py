"""SSD's matching of objects to prior boxes, and its loss (Liu et al., ECCV 2016, section 2.2)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from distill_d2.views.matching import hard_negatives


class Targets(NamedTuple):
    """What R prior boxes of N images should predict.

    Attributes:
        classes: (N, R) int64; K where a prior box is background.
        boxes: (N, R, 4) absolute XYXY; of background ones any object's.
        positive: (N, R) bool.
    """

    classes: torch.Tensor
    boxes: torch.Tensor
    positive: torch.Tensor


def match_priors(
    iou: torch.Tensor, valid: torch.Tensor, threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give each prior box the object that it overlaps most, and each object the prior box that overlaps it
    most; if several objects claim one, the last object gets it.

    Args:
        iou: (N, G, R) of objects and prior boxes; valid: (N, G) bool, which objects are there.
        threshold: from this IoU on a prior box is an object.

    Returns:
        (N, R) index of the object, and (N, R) bool whether the prior box is that object.
    """
    iou = torch.where(valid[..., None], iou, -1.0)
    best, index = iou.max(dim=1)
    best_prior = iou.argmax(dim=2)
    order = torch.arange(iou.shape[1], device=iou.device).expand_as(best_prior)
    claimed_by = torch.full_like(index, -1).scatter_reduce(
        1, best_prior, torch.where(valid, order, -1), "amax"
    )
    claimed = claimed_by >= 0
    return torch.where(claimed, claimed_by, index), claimed | (best >= threshold)


def multibox_losses(
    logits: torch.Tensor,
    deltas: torch.Tensor,
    targets: Targets,
    target_deltas: torch.Tensor,
    ratio: float,
) -> dict[str, torch.Tensor]:
    """Cross entropy over objects and hard negatives, and smooth L1 over objects, both divided by the number
    of positive prior boxes in the batch.

    Args:
        logits: (N, R, K + 1), background last; deltas, target_deltas: (N, R, 4).
        ratio: of ``hard_negatives``.

    Returns:
        {"loss_cls", "loss_box_reg"}; 0 without objects.
    """
    losses = F.cross_entropy(logits.flatten(0, 1), targets.classes.flatten(), reduction="none")
    losses = losses.view_as(targets.classes)
    selected = targets.positive | hard_negatives(losses, targets.positive, ratio)
    distances = F.smooth_l1_loss(deltas, target_deltas, reduction="none").sum(dim=-1)
    count = targets.positive.sum().clamp(min=1)
    return {
        "loss_cls": losses.where(selected, losses.new_zeros(())).sum() / count,
        "loss_box_reg": distances.where(targets.positive, distances.new_zeros(())).sum() / count,
    }
