"""FGD: where boxes count on each level, and the attention of student and teacher."""

from __future__ import annotations

from distill_d2.losses.attention import spatial_attention
from distill_d2.losses.fgd import FGD
from distill_d2.views import Batch, DetectorView

from . import ColorScale, Picture, Row, method
from .attention_maps import attention_rows


@method(loss="FGD", shows_parameters=False)
def fgd(
    loss: FGD, student: DetectorView, teacher: DetectorView, batch: Batch, picture: Picture
) -> list[Row]:
    """The foreground mask of each level, where the smallest box of a cell counts, relative to the largest
    value of the level; then both attentions."""
    pairs = loss.pairs(student, teacher)
    panels = [picture.ground_truth()]
    for name, (_, t) in pairs.items():
        mask = loss.masks(batch, name, (t.shape[-2], t.shape[-1]))[0][0]
        cells = int((mask > 0).sum())
        relative = mask / mask.max().clamp(min=1e-12)
        panels.append(picture.heat(f"{name}: {cells} cells of objects", relative, batch.padded_size))
    temperature = loss.settings.temperature
    attention = {
        name: (spatial_attention(s, temperature)[0], spatial_attention(t, temperature)[0])
        for name, (s, t) in pairs.items()
    }
    first = Row(panels, ColorScale("weight, relative to the level's largest", 1.0))
    return [first, *attention_rows(attention, batch, picture)]
