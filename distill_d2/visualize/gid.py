"""GID: the general instances, where student and teacher disagree most, by kind."""

from __future__ import annotations

import torch

from distill_d2.losses.gid import GID, GeneralInstances
from distill_d2.views import Batch, DetectorView

from . import LegendEntry, Mark, Picture, Row, method
from .picture import SKY, VERMILION, WHITE, YELLOW

_KINDS = {
    "pos": ("positive", SKY),
    "semi_pos": ("semi-positive", YELLOW),
    "neg": ("negative", VERMILION),
}
_NO_KIND = ("none of them", WHITE)


@method(loss="GID", shows_parameters=False)
def gid(
    loss: GID, student: DetectorView, teacher: DetectorView, batch: Batch, picture: Picture
) -> list[Row]:
    """Ground truth beside the selected instances: the color is the kind, the number the score, and a
    dashed box is the student's, the others are the teacher's."""
    mode = loss.settings.gi_mode
    if mode == "gt":
        return [Row([picture.ground_truth("instances are the ground truth, GI_MODE gt")])]
    heads = loss.predictions(student, teacher)
    instances = loss.instances(heads, batch)
    return [selection_row(instances, loss.categories(instances, heads[0], batch), mode, picture)]


def selection_row(
    instances: GeneralInstances, kinds: dict[str, torch.Tensor], mode: str, picture: Picture
) -> Row:
    """The row of the first image.

    Args:
        kinds: (N, K) bool of "pos", "semi_pos" and "neg".
        mode: GI_MODE, for the title.
    """
    marks, counts = [], dict.fromkeys([*_KINDS.values(), _NO_KIND], 0)
    for slot in instances.valid[0].nonzero().flatten().tolist():
        kind = next((_KINDS[name] for name, mask in kinds.items() if mask[0, slot]), _NO_KIND)
        counts[kind] += 1
        box, score = instances.boxes[0, slot].tolist(), float(instances.scores[0, slot])
        dashed = not instances.from_teacher[0, slot]
        marks.append(Mark(box, kind[1], f"{score:.2f}", dashed=dashed))
    legend = [LegendEntry(f"{name} ({count})", color) for (name, color), count in counts.items()]
    legend.append(LegendEntry("the student's box", WHITE, dashed=True))
    title = f"{len(marks)} general instances with scores (GI_MODE {mode})"
    return Row([picture.ground_truth(), picture.boxes(title, marks)], legend=legend)
