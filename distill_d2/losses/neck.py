"""Losses that are a sum over the levels of both necks."""

from __future__ import annotations

import torch

from ..views import Batch, DetectorView
from .base import DistillLoss

LevelTerms = dict[str, dict[str, torch.Tensor]]


class NeckLoss(DistillLoss):
    """The sum over levels of one term, or of several, each with a weight.

    A subclass implements ``level_terms``. The weight of a term "fg" is the setting ``fg_weight``; 1 where there
    is no such setting.
    """

    def level_terms(self, student: DetectorView, teacher: DetectorView, batch: Batch) -> LevelTerms:
        """The unweighted terms of each level, scalars in float32: {"p3": {"fg": ..., "bg": ...}}.

        The only term of a loss is called "".
        """
        raise NotImplementedError(f"{type(self).__name__}.level_terms")

    def forward(
        self, student: DetectorView, teacher: DetectorView, batch: Batch
    ) -> dict[str, torch.Tensor]:
        """{"loss_<node>_<term>": scalar}, or {"loss_<node>": scalar}: the sum over levels times the term's
        weight."""
        levels = self.level_terms(student, teacher, batch).values()
        terms = {name: torch.stack([level[name] for level in levels]) for name in next(iter(levels))}
        node = self.NODE.lower()
        return {
            f"loss_{node}_{name}" if name else f"loss_{node}": self.term_weight(name) * values.sum()
            for name, values in terms.items()
        }

    def term_weight(self, term: str) -> float:
        """The weight of a term, beside that of the whole loss."""
        return getattr(self.settings, f"{term}_weight", 1.0)
