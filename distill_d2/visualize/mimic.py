"""FeatureMimic: the distance of both feature maps, where it is and how large."""

from __future__ import annotations

import torch

from distill_d2.losses.feature_mimic import FeatureMimic
from distill_d2.views import Batch, DetectorView

from . import Picture, Row, method
from .error_maps import error_row, standardize


@method(loss="FeatureMimic")
def mimic(
    loss: FeatureMimic, student: DetectorView, teacher: DetectorView, batch: Batch, picture: Picture
) -> list[Row]:
    """LOSS_FORM's distance after NORMALIZE, the mean over channels, on each level."""
    pairs = loss.pairs(student, teacher).items()
    errors = {name: _distance(loss, *maps) for name, maps in pairs}
    return [error_row(errors, batch, picture, "distance, mean over channels")]


def _distance(loss: FeatureMimic, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    if loss.norm_dims is not None:
        student, teacher = (standardize(x, loss.norm_dims, unbiased=False) for x in (student, teacher))
    return loss.distance(student, teacher, reduction="none")
