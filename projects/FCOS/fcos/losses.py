"""FCOS' losses, with every variant that its public implementation has."""

from __future__ import annotations

from collections.abc import Collection
from typing import Callable

import torch
import torch.nn.functional as F
from detectron2.utils import comm
from fvcore.nn import sigmoid_focal_loss_jit
from torch import nn

from .targets import Targets

# Of IoU and GIoU.
BOX_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "giou": lambda _iou, giou: 1 - giou,
    "iou": lambda iou, _giou: -iou.log(),
    "linear_iou": lambda iou, _giou: 1 - iou,
}
QUALITIES = ("ctrness", "iou")
NORMALIZERS = ("fg", "moving_fg", "all")


class FCOSLoss(nn.Module):
    """Focal loss of all locations, and of positive ones a box loss and a binary cross entropy of the
    quality (arXiv 2006.09214, section 3.1)."""

    def __init__(
        self,
        *,
        alpha: float = 0.25,
        gamma: float = 2.0,
        normalizer_cls: str = "fg",
        weight_cls: float = 1.0,
        box_loss: str = "giou",
        quality: str = "ctrness",
    ):
        """
        Args:
            alpha, gamma: of the focal loss.
            normalizer_cls: what divides it: "fg", the number of positive locations, "moving_fg", a
                moving average of that, or "all", the number of locations; each a mean over processes.
            weight_cls: multiplies it.
            box_loss: 1 - GIoU ("giou"), 1 - IoU ("linear_iou") or -log IoU ("iou").
            quality: what the quality branch predicts: "ctrness", with which the box loss is weighted
                then, or "iou".

        Raises:
            ValueError: an unknown choice.
        """
        super().__init__()
        _check("LOSS_NORMALIZER_CLS", normalizer_cls, NORMALIZERS)
        _check("LOC_LOSS_TYPE", box_loss, BOX_LOSSES)
        _check("BOX_QUALITY", quality, QUALITIES)
        self.alpha = alpha
        self.gamma = gamma
        self.normalizer_cls = normalizer_cls
        self.weight_cls = weight_cls
        self.box_loss = box_loss
        self.quality = quality
        # Not in state_dict, as in the public implementation; checkpoints of a training have it (view.py).
        self.register_buffer("moving_positives", torch.tensor(100.0), persistent=False)

    def forward(
        self, logits: torch.Tensor, ltrb: torch.Tensor, quality: torch.Tensor, targets: Targets
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            logits: (N, K, R); ltrb: (N, 4, R) in strides; quality: (N, R) logits.

        Returns:
            {"loss_fcos_cls", "loss_fcos_loc", "loss_fcos_ctr" or "loss_fcos_iou"} in float32.
        """
        logits, ltrb, quality = logits.float(), ltrb.float(), quality.float()
        positive = targets.positive
        # Where there is no object, any boxes whose losses are finite.
        ltrb, target = (torch.where(positive[:, None], x, 1.0) for x in (ltrb, targets.ltrb))
        centerness = centerness_of(target) * positive
        count, weights = rank_mean(positive.sum(), centerness.sum())
        count = count.clamp(min=1)
        iou, giou = smoothed_ious(ltrb, target)
        box_losses = BOX_LOSSES[self.box_loss](iou, giou)
        losses = {"loss_fcos_cls": self._class_loss(logits, targets.classes, count)}
        if self.quality == "ctrness":
            losses["loss_fcos_loc"] = (box_losses * centerness).sum() / weights.clamp(min=1e-6)
            losses["loss_fcos_ctr"] = _bce(quality, centerness, positive) / count
            return losses
        losses["loss_fcos_loc"] = (box_losses * positive).sum() / count
        losses["loss_fcos_iou"] = _bce(quality, iou.detach(), positive) / count
        return losses

    def _class_loss(
        self, logits: torch.Tensor, classes: torch.Tensor, count: torch.Tensor
    ) -> torch.Tensor:
        kinds = torch.arange(logits.shape[1], device=logits.device)[:, None]
        one_hot = (classes[:, None] == kinds).to(logits.dtype)
        loss = sigmoid_focal_loss_jit(logits, one_hot, self.alpha, self.gamma, reduction="sum")
        return self.weight_cls * loss / self._class_normalizer(classes, count)

    def _class_normalizer(self, classes: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        if self.normalizer_cls == "fg":
            return count
        if self.normalizer_cls == "moving_fg":
            self.moving_positives.mul_(0.9).add_(0.1 * count)
            return self.moving_positives.clone()
        (locations,) = rank_mean(torch.full_like(count, classes.numel()))
        return locations


def smoothed_ious(ltrb: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """IoU with 1 added to intersection and union, and GIoU from it.

    The public implementation adds it to areas in squared strides, where it is a lot; kept, so that
    training and released weights match it.

    Args:
        ltrb, target: (N, 4, R) distances from one location to the sides of two boxes.

    Returns:
        (N, R) each.
    """
    common, enclosing = torch.minimum(ltrb, target), torch.maximum(ltrb, target)
    intersection, hull = _area(common), _area(enclosing)
    union = _area(ltrb) + _area(target) - intersection
    iou = (intersection + 1) / (union + 1)
    return iou, iou - (hull - union) / hull


def centerness_of(ltrb: torch.Tensor) -> torch.Tensor:
    """(N, R): of distances (N, 4, R) to the sides, the square root of the ratios of the shorter to the
    longer one, 1 in the middle and 0 at a side (arXiv 2006.09214, eq. 3)."""
    first, second = ltrb.unflatten(1, (2, 2)).unbind(1)  # left and top, right and bottom
    ratio = torch.minimum(first, second) / torch.maximum(first, second)
    return ratio.prod(dim=1).sqrt()


def rank_mean(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The mean over all processes of each scalar, in float32."""
    mean = torch.stack([value.float() for value in values])
    if comm.get_world_size() > 1:
        torch.distributed.all_reduce(mean)
        mean = mean / comm.get_world_size()
    return mean.unbind()


def _area(ltrb: torch.Tensor) -> torch.Tensor:
    left, top, right, bottom = ltrb.unbind(1)
    return (left + right) * (top + bottom)


def _bce(logits: torch.Tensor, target: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (losses * positive).sum()


def _check(key: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"MODEL.FCOS.{key} is '{value}'; expected one of {list(choices)}")
