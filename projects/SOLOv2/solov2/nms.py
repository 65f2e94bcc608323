"""Non-maximum suppression of masks and of cells."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from distill_d2.tracing import is_recorded


def point_nms(scores: torch.Tensor) -> torch.Tensor:
    """Scores (N, K, S, S) that are the highest of the 2 x 2 window that ends at them; others are 0."""
    highest = F.max_pool2d(scores, kernel_size=2, stride=1, padding=1)[..., :-1, :-1]
    return torch.where(scores == highest, scores, 0.0)


def mask_ious(masks: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """(n, n): at (i, j) the intersection over union of masks (n, H, W), bool, where i comes before j and
    both are of one class (n,); elsewhere 0."""
    flat = masks.flatten(1).float()
    common, area = flat @ flat.t(), flat.sum(dim=1)
    union = area[:, None] + area - common
    comparable = (classes[:, None] == classes).triu(diagonal=1)
    return torch.where(comparable, common / union.clamp(min=1), 0.0)


def matrix_nms(ious: torch.Tensor, kernel: str = "gaussian", sigma: float = 2.0) -> torch.Tensor:
    """Matrix NMS (arXiv 2003.10152, section 3.4): the factor of each mask's score, (n,).

    A mask decays with its IoU f with each better one, the less so the more that one has decayed itself:
    min over i of f(iou_ij) / f(max over k of iou_ki), f(iou) = 1 - iou or exp(-sigma iou^2).

    Args:
        ious: of ``mask_ious``, masks by falling score.
        kernel: "gaussian" or "linear"; sigma: of the first.
    """
    # One more row, of zeros, which changes no minimum: the best mask's row is 1 at most. Without masks it is the
    # only one, and there is always a maximum.
    ious = F.pad(ious, (0, 0, 1, 0))
    own = F.pad(ious.amax(dim=0), (1, 0))[:, None]
    if kernel == "gaussian":
        return torch.exp(-sigma * (ious.square() - own.square())).amin(dim=0)
    # A mask that equals a better one decays to 0, and makes no other decay that the better one does not.
    smallest = torch.finfo(ious.dtype).eps
    return ((1 - ious) / (1 - own).clamp(min=smallest)).amin(dim=0)


def mask_nms(ious: torch.Tensor, threshold: float) -> torch.Tensor:
    """Greedy NMS: which masks (n,) have no better one that is kept and overlaps them by more than this.

    Args: as of ``matrix_nms``.
    """
    if is_recorded():
        raise ValueError(
            "MODEL.SOLOV2.NMS_TYPE is 'mask', whose number of rounds depends on the image; only 'matrix' can be "
            "exported as a graph"
        )
    overlaps = ious > threshold
    keep = torch.ones_like(overlaps[0]) if len(ious) else overlaps.new_zeros(0)
    while True:  # right is the first, and each whose better ones are: after n rounds all, mostly sooner
        again = ~(overlaps & keep[:, None]).any(dim=0)
        if torch.equal(again, keep):
            return keep
        keep = again
