"""Batch normalization inside losses: by the statistics of the batch alone, which is all that training uses."""

from __future__ import annotations

import torch
from detectron2.utils import comm
from fvcore.nn.distributed import differentiable_all_reduce
from torch import nn

#: Comment of a setting.
SYNC_NORM = "Batch statistics in the loss's modules are those of all processes, not of each alone."

_OVER = (0, 2, 3)


class BatchStatisticsNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d without running statistics, for maps (N, C, H, W) of any size.

    It differs from torch's in that a channel may have a single value (it becomes the bias, as a constant
    channel does), and that statistics may be those of all processes. torch's SyncBatchNorm needs a GPU, and
    detectron2's NaiveSyncBatchNorm running statistics.
    """

    def __init__(
        self, channels: int, *, affine: bool = True, synchronized: bool = False, weight: float = 1.0
    ):
        """
        Args:
            channels: C.
            affine: each channel has a weight and a bias.
            synchronized: statistics are over all processes, whose maps may have different sizes.
            weight: the first value of all weights.
        """
        super().__init__(channels, affine=affine, track_running_stats=False)
        self.synchronized = synchronized
        if affine:
            nn.init.constant_(self.weight, weight)

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        if self.synchronized and comm.get_world_size() > 1:
            return self._of_all_processes(feature)
        # F.batch_norm refuses a single value per channel.
        weight, bias, cudnn = self.weight, self.bias, torch.backends.cudnn.enabled
        return torch.batch_norm(feature, weight, bias, None, None, True, 0.0, self.eps, cudnn)

    def _of_all_processes(self, feature: torch.Tensor) -> torch.Tensor:
        own_count = feature.new_full((1,), feature.numel() / feature.shape[1])
        totals = differentiable_all_reduce(torch.cat([feature.sum(_OVER), own_count]))
        sums, count = totals[:-1], totals[-1]
        centered = feature - _per_channel(sums / count)
        variance = differentiable_all_reduce(centered.square().sum(_OVER)) / count
        normed = centered * _per_channel((variance + self.eps).rsqrt())
        return normed * _per_channel(self.weight) + _per_channel(self.bias) if self.affine else normed


def _per_channel(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None]
