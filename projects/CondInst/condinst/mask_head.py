"""CondInst's mask head: a small network per instance, whose weights another network predicts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .mask_branch import aligned_bilinear


class DynamicMaskHead(nn.Module):
    """1x1 convolutions over the mask branch's output and coordinates relative to the instance (arXiv
    2003.05664, section 3.2)."""

    def __init__(
        self,
        *,
        in_channels: int,
        in_stride: int,
        out_stride: int,
        sizes_of_interest: Sequence[int],
        channels: int = 8,
        num_layers: int = 3,
        relative_coordinates: bool = True,
    ):
        """
        Args:
            in_channels, in_stride: of the mask branch's output; stride in pixels.
            out_stride: of the masks, a divisor of ``in_stride``.
            sizes_of_interest: of each level, what the coordinates are divided by, in pixels.
            channels: between the convolutions.

        Raises:
            ValueError: the strides do not fit.
        """
        super().__init__()
        if out_stride < 1 or in_stride % out_stride:
            raise ValueError(
                f"MODEL.CONDINST.MASK_OUT_STRIDE is {out_stride}; expected a divisor of the mask "
                f"branch's stride, {in_stride}"
            )
        self.in_stride = in_stride
        self.out_stride = out_stride
        self.relative_coordinates = relative_coordinates
        first = in_channels + (2 if relative_coordinates else 0)
        outs = [channels] * (num_layers - 1) + [1]
        self.shapes = list(zip(outs, [first, *outs[:-1]]))
        self.register_buffer("sizes_of_interest", torch.tensor(sizes_of_interest))
        # Counts training steps, as in checkpoints of the public implementation; nothing reads it.
        self.register_buffer("_iter", torch.zeros(1))

    @property
    def num_params(self) -> int:
        """Numbers per instance: all weights (out, in) of the layers in turn, then all biases."""
        return sum(out * (into + 1) for out, into in self.shapes)

    def forward(
        self,
        mask_features: torch.Tensor,
        params: torch.Tensor,
        locations: torch.Tensor,
        levels: torch.Tensor,
        counts: Sequence[int],
    ) -> torch.Tensor:
        """The mask logits of M instances of N images.

        Args:
            mask_features: (N, C, H, W).
            params: (M, num_params), image by image.
            locations: (M, 2) x, y in pixels; levels: (M,) int64.
            counts: the number of instances of each image.

        Returns:
            (M, 1, H in_stride / out_stride, W in_stride / out_stride).
        """
        size = mask_features.shape[-2:]
        weights, biases = self._split(params)
        x = self._first_layer(mask_features, weights[0], locations, levels, counts)
        x = x + biases[0].unsqueeze(-1)
        for weight, bias in zip(weights[1:], biases[1:]):
            x = torch.baddbmm(bias.unsqueeze(-1), weight, F.relu(x))
        return aligned_bilinear(x.reshape(*x.shape[:2], *size), self.in_stride // self.out_stride)

    def _split(self, params: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        lengths = [out * into for out, into in self.shapes]
        parts = params.split(lengths + [out for out, _ in self.shapes], dim=1)
        weights = [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes)]
        return weights, list(parts[len(weights) :])

    def _first_layer(
        self,
        mask_features: torch.Tensor,
        weight: torch.Tensor,
        locations: torch.Tensor,
        levels: torch.Tensor,
        counts: Sequence[int],
    ) -> torch.Tensor:
        """(M, out, H W), without a copy of an image's features for each of its instances."""
        of_coordinates = weight[..., :2] if self.relative_coordinates else None
        of_features = weight[..., 2:] if self.relative_coordinates else weight
        x = torch.cat(
            [
                (image.flatten(0, 1) @ features.flatten(1)).unflatten(0, image.shape[:2])
                for image, features in zip(of_features.split(list(counts)), mask_features)
            ]
        )
        if of_coordinates is None:
            return x
        height, width = mask_features.shape[-2:]
        by_x = self._relative(width, locations[:, :1], levels) * of_coordinates[..., :1]
        by_y = self._relative(height, locations[:, 1:], levels) * of_coordinates[..., 1:]
        return x + (by_y.unsqueeze(-1) + by_x.unsqueeze(-2)).flatten(2)

    def _relative(self, length: int, centers: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """(M, 1, length): from each of ``length`` cells to the instance, along one axis."""
        cells = torch.arange(length, device=centers.device) * self.in_stride + self.in_stride // 2
        sizes = self.sizes_of_interest[levels].to(centers.dtype)
        return ((centers - cells) / sizes[:, None]).unsqueeze(1)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # Checkpoints of 2020 have no counter.
        state_dict.setdefault(f"{prefix}_iter", self._iter)
        super()._load_from_state_dict(state_dict, prefix, *args)


def dice_losses(probabilities: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """1 - 2 sum(p g) / (sum(p^2) + sum(g^2)) of each of M instances (arXiv 2003.05664, eq. 4; Milletari
    et al., 3DV 2016).

    Args:
        probabilities, masks: (M, ...).

    Returns:
        (M,).
    """
    p, g = probabilities.flatten(1), masks.flatten(1)
    overlap = (p * g).sum(dim=1)
    return 1 - 2 * overlap / (p.square().sum(dim=1) + g.square().sum(dim=1) + 1e-5)
