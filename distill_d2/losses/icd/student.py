"""The student's side, which computes values only."""

from __future__ import annotations

import torch
from torch import nn

from .decoder import project_positions
from .geometry import Geometry
from .mimic import value_distance
from .projection import project_levels


class StudentValues(nn.Module):
    """The student's value projection, to be compared with that of one decoder layer."""

    def __init__(self, dim: int, *, positions: bool, project: bool):
        """
        Args:
            dim: C.
            positions: add the positional embedding to the features.
            project: apply a linear layer to the embedding first.
        """
        super().__init__()
        self.values = nn.Linear(dim, dim)
        self.positions = positions
        self.pos_projector = nn.Linear(dim, dim) if positions and project else None

    def offsets(self, geometry: Geometry):
        """The part of the values that depends on positions, see project_levels; None without positions."""
        if not self.positions:
            return None
        return project_positions(self.pos_projector, geometry, self.values.weight, self.values.bias)

    def project(self, maps: list[torch.Tensor], geometry: Geometry) -> torch.Tensor:
        """The values (N, S, C) of the levels (N, C, H, W)."""
        return project_levels(maps, self.values.weight, self.values.bias, self.offsets(geometry))

    def forward(
        self,
        maps: list[torch.Tensor],
        geometry: Geometry,
        teacher: torch.Tensor,
        mass: torch.Tensor,
        *,
        form: str,
        norm: str,
    ) -> torch.Tensor:
        """The distance of the values from the teacher's, a scalar; see value_distance.

        Args:
            teacher: (N, S, C) values.
            mass: (N, h, S) attention of the instances.
            form, norm: see value_distance.
        """
        weight, bias, offsets = self.values.weight, self.values.bias, self.offsets(geometry)
        return value_distance(maps, weight, bias, offsets, teacher, mass, form=form, norm=norm)
