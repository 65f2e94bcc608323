"""AT: the attention of student and teacher on each level."""

from __future__ import annotations

from distill_d2.losses.at import AT, normalized_attention
from distill_d2.views import Batch, DetectorView

from . import Picture, Row, method
from .attention_maps import attention_rows


@method(loss="AT")
def at(
    loss: AT, student: DetectorView, teacher: DetectorView, batch: Batch, picture: Picture
) -> list[Row]:
    """A level's normalized attention, times the square root of its number of cells: 1 where it is even."""
    maps = {}
    for name, pair in loss.pairs(student, teacher).items():
        both = [normalized_attention(feature)[0] for feature in pair]
        maps[name] = (both[0] * both[0].numel() ** 0.5, both[1] * both[1].numel() ** 0.5)
    return attention_rows(maps, batch, picture)
