"""What is logged when a Distiller is built: which levels of student and teacher are compared, and how."""

from __future__ import annotations

from collections.abc import Mapping

from tabulate import tabulate

from ..losses import DistillLoss
from ..views import DetectorView
from ..views.probe import level_shapes

_HEADER = ["loss", "level", "stride", "student (C, H, W)", "teacher (C, H, W)", "adapter"]


def describe_levels(
    losses: Mapping[str, DistillLoss],
    student: DetectorView,
    teacher: DetectorView,
    size: tuple[int, int],
) -> str:
    """A table of the levels that losses compare; "" if there are none.

    Args:
        losses: by registered name, bound to both views.
        size: (H, W) in pixels of the image whose shapes are shown.
    """
    of_student, of_teacher = level_shapes(student, *size), level_shapes(teacher, *size)
    rows = [
        [name, *row]
        for name, loss in losses.items()
        for pairs in loss.feature_pairs()
        for row in pairs.describe(of_student, of_teacher)
    ]
    if not rows:
        return ""
    title = f"Levels compared (shapes of a {size[0]}x{size[1]} image):\n"
    return title + tabulate(rows, headers=_HEADER, tablefmt="pipe")
