"""DeFeat and FGFI: what counts as objects on each level, and where student and teacher differ."""

from __future__ import annotations

from distill_d2.losses.defeat import DeFeat
from distill_d2.losses.fgfi import FGFI
from distill_d2.losses.object_masks import ObjectMasks
from distill_d2.losses.pairing import FeaturePairs
from distill_d2.losses.regions import distance_map
from distill_d2.views import Batch, DetectorView

from . import ColorScale, Picture, Row, method
from .error_maps import error_row


@method(loss="DeFeat")
def defeat(
    loss: DeFeat, student: DetectorView, teacher: DetectorView, batch: Batch, picture: Picture
) -> list[Row]:
    """The neck's masks, and LOSS_FORM's distance, the mean over channels, on each level."""
    if loss.neck is None:
        return [Row([picture.ground_truth("no levels: HINT_NECK_W and HINT_NECK_BACK_W are 0")])]
    return _rows(loss.neck, loss.masks, loss.settings.loss_form, student, teacher, batch, picture)


@method(loss="FGFI")
def fgfi(
    loss: FGFI, student: DetectorView, teacher: DetectorView, batch: Batch, picture: Picture
) -> list[Row]:
    """The masks, and the squared distance, the mean over channels, on each level."""
    return _rows(loss.pairs, loss.masks, "L2", student, teacher, batch, picture)


def _rows(
    levels: FeaturePairs,
    masks: ObjectMasks,
    form: str,
    student: DetectorView,
    teacher: DetectorView,
    batch: Batch,
    picture: Picture,
) -> list[Row]:
    pairs = levels(student, teacher)
    scale = ColorScale("mask", 1.0)
    panels = [picture.ground_truth()]
    for name, mask in masks.of_pairs(student, batch, pairs, levels.strides).items():
        cells = float(picture.visible(mask[0], batch.padded_size).sum())
        panels.append(picture.heat(f"{name}: {cells:.4g} cells of objects", mask[0], batch.padded_size))
    errors = {name: distance_map(s, t, form)[:, None] / s.shape[1] for name, (s, t) in pairs.items()}
    label = f"{form} distance, mean over channels"
    return [Row(panels, scale), error_row(errors, batch, picture, label)]
