"""PKD: the squared difference of both standardized feature maps, where it is and how large."""

from __future__ import annotations

from distill_d2.losses.pkd import PKD
from distill_d2.views import Batch, DetectorView

from . import Picture, Row, method
from .error_maps import error_row, standardize

_CHANNELWISE = (0, 2, 3)


@method(loss="PKD")
def pkd(
    loss: PKD, student: DetectorView, teacher: DetectorView, batch: Batch, picture: Picture
) -> list[Row]:
    """|s^ - t^|^2, the mean over channels, on each level: 0 where both vary alike, 2 on average where
    they do not correlate. Each channel is standardized over this one image."""
    pairs = loss.pairs(student, teacher).items()
    errors = {}
    for name, maps in pairs:
        s, t = (standardize(feature, _CHANNELWISE, unbiased=True) for feature in maps)
        errors[name] = (s - t) ** 2
    return [error_row(errors, batch, picture, "|s - t|\u00b2 standardized, mean over channels")]
