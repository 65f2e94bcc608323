"""MGD: the hidden cells, and where the map that is made of the others differs from the teacher's."""

from __future__ import annotations

from distill_d2.losses.mgd import MGD
from distill_d2.views import Batch, DetectorView

from . import ColorScale, Picture, Row, method
from .error_maps import error_row


@method(loss="MGD")
def mgd(
    loss: MGD, student: DetectorView, teacher: DetectorView, batch: Batch, picture: Picture
) -> list[Row]:
    """A row of the cells that are hidden in this iteration, and below it one of the squared difference, the
    mean over channels: a student whose features hold the teacher's has no more of it at hidden cells."""
    panels, errors = [picture.ground_truth()], {}
    for name, (s, t) in loss.pairs(student, teacher).items():
        kept = loss.kept(name, s, batch.iteration)
        hidden, share = 1 - kept[0, 0], 1 - float(kept[0].mean())
        panels.append(picture.heat(f"{name}: {share:.0%} hidden", hidden, batch.padded_size))
        errors[name] = (loss.generation[name](s * kept) - t).square()
    label = "|made - t|\u00b2, mean over channels"
    return [Row(panels, ColorScale("hidden", 1.0)), error_row(errors, batch, picture, label)]
