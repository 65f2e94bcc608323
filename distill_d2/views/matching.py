"""Which rows belong to given boxes: detectron2's rules on a whole batch at once.

detectron2's Matcher works image by image and waits for the device. These functions give the same labels
without waiting, except for a box that overlaps no row: it matches no row here, and every row with
Matcher's low-quality matches.
"""

from __future__ import annotations

import torch
from detectron2.modeling.matcher import Matcher

_EPS = 1e-7


def batched_iou(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Intersection over union of every pair.

    Args:
        boxes: (..., M, 4), absolute XYXY; others: (..., R, 4), with leading dimensions that broadcast.

    Returns:
        (..., M, R); NaN where both areas are 0.
    """
    boxes, others = boxes.unsqueeze(-2), others.unsqueeze(-3)
    common = intersection(boxes, others)
    return common / (area(boxes) + area(others) - common)


def batched_ioa(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """(..., M, R): the part of each of ``boxes`` inside each of ``others``; see ``batched_iou``."""
    boxes, others = boxes.unsqueeze(-2), others.unsqueeze(-3)
    return intersection(boxes, others) / area(boxes)


def match_by_iou(
    matcher: Matcher, boxes: torch.Tensor, valid: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """The labels that ``matcher`` gives to rows.

    Args:
        boxes: (N, M, 4), absolute XYXY, M at least 1; valid: (N, M) bool.
        rows: (R, 4) or (N, R, 4) anchors or proposals.

    Returns:
        (N, R) int8: 1 positive, 0 negative, -1 ignored.
    """
    iou = batched_iou(boxes, rows.expand(len(boxes), *rows.shape[-2:]))
    iou = torch.where(valid[..., None], iou, -1.0)
    best = iou.amax(dim=1)
    labels = torch.full_like(best, matcher.labels[0], dtype=torch.int8)
    for threshold, label in zip(matcher.thresholds[1:-1], matcher.labels[1:]):
        labels = torch.where(best >= threshold, label, labels)
    if not matcher.allow_low_quality_matches:
        return labels
    highest = iou.amax(dim=2, keepdim=True)
    low_quality = ((iou == highest) & (highest > 0)).any(dim=1)
    return torch.where(low_quality, 1, labels)


def assign_by_iou(boxes: torch.Tensor, valid: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The valid box that each row overlaps most, (N, R) int64. Args: see ``match_by_iou``."""
    iou = batched_iou(boxes, rows.expand(len(boxes), *rows.shape[-2:]))
    return torch.where(valid[..., None], iou, -1.0).argmax(dim=1)


def hard_negatives(losses: torch.Tensor, positive: torch.Tensor, ratio: float) -> torch.Tensor:
    """The rows without an object whose class loss is highest (Liu et al., SSD, ECCV 2016, section 2.2).

    Args:
        losses: (N, R) class losses; positive: (N, R) bool.
        ratio: number of negatives per positive row of the same image; at most R - 1 are chosen.

    Returns:
        (N, R) bool.
    """
    rows = losses.shape[1]
    count = (positive.sum(dim=1, keepdim=True) * ratio).clamp(max=rows - 1)
    order = losses.detach().masked_fill(positive, 0.0).argsort(dim=1, descending=True)
    chosen = torch.arange(rows, device=losses.device) < count
    return torch.zeros_like(positive).scatter(1, order, chosen) & ~positive


def rows_inside(boxes: torch.Tensor, valid: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Which rows have their center inside a valid box.

    Args: see ``match_by_iou``.

    Returns:
        (N, R) bool.
    """
    x1, y1, x2, y2 = boxes.unsqueeze(-2).unbind(-1)
    left, top, right, bottom = rows.expand(len(boxes), *rows.shape[-2:]).unsqueeze(1).unbind(-1)
    x, y = (left + right) / 2, (top + bottom) / 2
    inside = (x > x1) & (x < x2) & (y > y1) & (y < y2)
    return (inside & valid[..., None]).any(dim=1)


def intersection(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """(...): the area that boxes (..., 4) and others (..., 4) share, pair by pair."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    left, top, right, bottom = others.unbind(-1)
    width = (torch.minimum(x2, right) - torch.maximum(x1, left)).clamp(min=0)
    height = (torch.minimum(y2, bottom) - torch.maximum(y1, top)).clamp(min=0)
    return width * height


def area(boxes: torch.Tensor) -> torch.Tensor:
    """(...): of boxes (..., 4)."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return (x2 - x1) * (y2 - y1)


def giou_distance(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """1 - generalized IoU of boxes (..., 4) and others (..., 4), pair by pair (arXiv 1902.09630).

    fvcore and torchvision index the pairs that overlap, which waits for the device.
    """
    common = intersection(boxes, others)
    union = area(boxes) + area(others) - common
    corners = torch.minimum(boxes[..., :2], others[..., :2])
    hull = area(torch.cat([corners, torch.maximum(boxes[..., 2:], others[..., 2:])], dim=-1))
    return 1 - common / (union + _EPS) + (hull - union) / (hull + _EPS)
