"""The conditional decoder: query slots attend to the teacher's features (ICD, NeurIPS 2021)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .geometry import Geometry
from .projection import Offsets, project_levels


def project_positions(
    projector: nn.Linear | None, geometry: Geometry, weight: torch.Tensor, bias: torch.Tensor
) -> Offsets:
    """``weight`` (projected positional embedding) + bias, as a part of the row and one of the column.

    The embedding is row beside column and all maps are linear, so H + W rows suffice for H * W.

    Args:
        projector: Linear C to C; None: the embedding itself.
        weight: (D, C); bias: (D,).
    """
    rows, columns = geometry.rows, geometry.columns
    half = rows.shape[-1]
    if projector is None:
        rows, columns = F.pad(rows, (0, half)), F.pad(columns, (half, 0))
    else:
        rows = F.linear(rows, projector.weight[:, :half])
        columns = F.linear(columns, projector.weight[:, half:], projector.bias)
    return F.linear(rows, weight), F.linear(columns, weight, bias)


@dataclass(frozen=True)
class Decoded:
    """What a decoder layer computed for K query slots and S positions, with h heads of d channels.

    Attributes:
        features: (N, K, C), the decoded slots.
        queries: (N, h, K, d); keys: (N, h, S, d), before scaling.
        values: (N, S, C), channel = head * d + j.
        padding: (N, S) bool or None, see Geometry.
    """

    features: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    padding: torch.Tensor | None

    def logits(self, image: int, slots: slice, temperature: float = 1.0) -> torch.Tensor:
        """Attention logits (h, slots, S) of one image, over ``temperature``; -inf in padding."""
        queries = self.queries[image, :, slots] * (self.queries.shape[-1] ** -0.5 / temperature)
        logits = queries @ self.keys[image].transpose(1, 2)
        return logits if self.padding is None else logits.masked_fill_(self.padding[image], -torch.inf)

    @torch.no_grad()
    def attention_mass(self, counts: Sequence[int], temperature: float) -> torch.Tensor:
        """Sum over the first ``counts[n]`` slots of image n of their attention: (N, h, S).

        The attention weights of all slots are never there at once: ``_MASS_CHUNK`` at a time.
        """
        batch, heads, positions, _ = self.keys.shape
        mass = self.keys.new_zeros(batch, heads, positions)
        for image, count in enumerate(counts):
            for start in range(0, count, _MASS_CHUNK):
                slots = slice(start, min(start + _MASS_CHUNK, count))
                mass[image] += self.logits(image, slots, temperature).softmax(dim=-1).sum(dim=1)
        return mass


_MASS_CHUNK = 16


class DecoderLayer(nn.Module):
    """Cross-attention and feed-forward network, both with residual and layer norm after it.

    No self-attention and no positional embedding of the queries. With ``bare`` the attention alone.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        project_positions: bool = True,
        positions_on_keys: bool = True,
        positions_on_values: bool = False,
        dropout: float = 0.0,
        bare: bool = False,
    ):
        """
        Args:
            dim: C, divisible by ``heads``.
            project_positions: a Linear on the positional embedding before it is added.
            positions_on_keys, positions_on_values: what the embedding is added to.
            dropout: of the attention weights.
        """
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.positions_on_keys = positions_on_keys
        self.positions_on_values = positions_on_values
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        nn.init.xavier_uniform_(self.in_proj_weight)
        self.out_proj = nn.Linear(dim, dim)
        nn.init.zeros_(self.out_proj.bias)
        used = positions_on_keys or positions_on_values
        self.pos_projector = nn.Linear(dim, dim) if project_positions and used else None
        self.feed_forward = not bare
        if not bare:
            self.linear_in, self.linear_out = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
            self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, queries: torch.Tensor, maps: list[torch.Tensor], geometry: Geometry) -> Decoded:
        """
        Args:
            queries: (N, K, C).
            maps: the levels, (N, C, H, W) each.
        """
        query_weight, key_weight, value_weight = self.in_proj_weight.chunk(3)
        query_bias, key_bias, value_bias = self.in_proj_bias.chunk(3)
        q = self._split(F.linear(queries, query_weight, query_bias))
        k = self._project(maps, geometry, key_weight, key_bias, self.positions_on_keys)
        values = self._project(maps, geometry, value_weight, value_bias, self.positions_on_values)
        k, v = self._split(k), self._split(values)
        mask = None if geometry.padding is None else ~geometry.padding[:, None, None]
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        attended = self.out_proj(attended.transpose(1, 2).flatten(2))
        features = self._feed_forward(queries, attended) if self.feed_forward else attended
        return Decoded(features, q, k, values, geometry.padding)

    def _project(self, maps, geometry, weight, bias, with_positions) -> torch.Tensor:
        offsets = None
        if with_positions:
            offsets = project_positions(self.pos_projector, geometry, weight, bias)
        return project_levels(maps, weight, bias, offsets)

    def _split(self, values: torch.Tensor) -> torch.Tensor:
        """(N, L, C) to (N, h, L, d)."""
        return values.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _feed_forward(self, queries: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        x = self.norm1(queries + attended)
        return self.norm2(x + self.linear_out(F.relu(self.linear_in(x))))


class ConditionalDecoder(nn.ModuleList):
    """Layers that cascade on the queries; each reads the features themselves. 0 layers: a bare one."""

    def __init__(self, layers: int, dim: int, heads: int, **options):
        """
        Args:
            options: of DecoderLayer.
        """
        bare = layers == 0
        super().__init__(DecoderLayer(dim, heads, bare=bare, **options) for _ in range(max(layers, 1)))

    def forward(
        self, queries: torch.Tensor, maps: list[torch.Tensor], geometry: Geometry
    ) -> list[Decoded]:
        """One Decoded per layer; arguments of DecoderLayer."""
        decoded = []
        for layer in self:
            decoded.append(layer(queries, maps, geometry))
            queries = decoded[-1].features
        return decoded


@contextlib.contextmanager
def dropout_seed(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers inside depend on ``seed`` alone, and change none outside."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
