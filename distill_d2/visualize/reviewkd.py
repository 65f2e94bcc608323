"""ReviewKD: where the maps that are made of the student's differ from the teacher's."""

from __future__ import annotations

from distill_d2.losses.review_kd import ReviewKD
from distill_d2.views import Batch, DetectorView

from . import Picture, Row, method
from .error_maps import error_row


@method(loss="ReviewKD")
def reviewkd(
    loss: ReviewKD, student: DetectorView, teacher: DetectorView, batch: Batch, picture: Picture
) -> list[Row]:
    """The squared difference, the mean over channels, on each level; norms have the statistics of this image."""
    pairs = loss.made(student, teacher)
    errors = {name: (made - t).square() for name, (made, t) in reversed(pairs.items())}
    return [error_row(errors, batch, picture, "|made - t|\u00b2, mean over channels")]
