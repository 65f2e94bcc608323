"""The auxiliary task that trains the decoder: which slots are real, and where (ICD, NeurIPS 2021)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import MLP

from .sampling import Queries

_MIN_SIDE = 1e-7


class AuxiliaryTask(nn.Module):
    """Predicts existence and box of every slot from its decoded features; shared by all layers."""

    def __init__(self, dim: int):
        """
        Args:
            dim: C, of the decoded features.
        """
        super().__init__()
        self.predictor = MLP(dim, [dim, dim, 5])

    def forward(self, features: torch.Tensor, queries: Queries) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses of existence and of localization, scalars.

        Existence: binary cross-entropy, mean over the batch's slots. Localization: L1 distance of
        left, top, right, bottom in units of the box's width and height, summed over the four, mean
        over the batch's real instances; 0 without any.

        Args:
            features: (N, K, C).
        """
        prediction = self.predictor(features)
        existence, ltrb = prediction[..., 0], prediction[..., 1:].sigmoid()
        filled = 1 - queries.is_padding
        entropy = F.binary_cross_entropy_with_logits(existence, queries.is_real, reduction="none")
        sides = queries.ltrb[..., :2] + queries.ltrb[..., 2:]
        errors = (ltrb - queries.ltrb).abs() / sides.repeat(1, 1, 2).clamp(min=_MIN_SIDE)
        return (
            (entropy * filled).sum() / max(sum(queries.filled), 1),
            (errors.sum(-1) * queries.is_real).sum() / max(sum(queries.real), 1),
        )
