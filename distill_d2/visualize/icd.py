"""ICD: where on the levels the decoder looks for each instance."""

from __future__ import annotations

import torch

from distill_d2.losses.icd import InstanceConditionalDistillation
from distill_d2.losses.icd.sampling import Queries
from distill_d2.views import Batch, DetectorView

from . import ColorScale, Mark, Panel, Picture, Row, method
from .picture import SKY, WHITE

_MOST = 5  # instances, the largest


@method(loss="InstanceConditionalDistillation")
def icd(
    loss: InstanceConditionalDistillation,
    student: DetectorView,
    teacher: DetectorView,
    batch: Batch,
    picture: Picture,
) -> list[Row]:
    """A row per instance: its box among the others, and the attention of the decoder's last layer, the
    mean over heads, on each level. It adds up to 1 over all positions of all levels."""
    maps, queries, geometry = loss.read(teacher, batch)
    decoded = loss.decode(maps, queries, geometry, batch.iteration)[-1]
    temperature = loss.temperature(batch.iteration, batch.max_iter)
    logits = decoded.logits(0, slice(queries.real[0]), temperature)
    attention = logits.softmax(dim=-1).mean(dim=0)  # (instances, positions)
    boxes = boxes_of(queries, picture)
    sides = boxes[:, 2:] - boxes[:, :2]
    largest = sides.prod(dim=1).argsort(descending=True)[:_MOST].tolist()
    if not largest:
        return [Row([picture.ground_truth()])]
    cells = [height * width for height, width in geometry.level_sizes]
    rows = []
    for rank, index in enumerate(largest, start=1):
        maps = [
            level.view(size) for level, size in zip(attention[index].split(cells), geometry.level_sizes)
        ]
        name = picture.class_name(int(queries.classes[0, index]))
        title = f"{name}, {rank} of {len(boxes)} by size"
        panels = [_among_others(title, boxes, index, name, picture)]
        levels = dict(zip(loss.pairs.in_features, maps))
        rows.append(_with_levels(panels, levels, boxes[index].tolist(), batch, picture))
    return rows


def boxes_of(queries: Queries, picture: Picture) -> torch.Tensor:
    """(n, 4) XYXY in pixels, of the image's real instances."""
    points, ltrb = (values[0, : queries.real[0]] for values in (queries.points, queries.ltrb))
    height, width = picture.size
    boxes = torch.cat([points - ltrb[:, :2], points + ltrb[:, 2:]], dim=1)
    return (boxes * boxes.new_tensor([width, height, width, height])).cpu()


def _among_others(title: str, boxes: torch.Tensor, index: int, name: str, picture: Picture) -> Panel:
    marks = [Mark(box, WHITE, thin=True) for box in boxes.tolist()]
    marks[index] = Mark(marks[index].box, SKY, name)
    return picture.boxes(title, [marks[index], *marks[:index], *marks[index + 1 :]])


def _with_levels(
    panels: list[Panel],
    levels: dict[str, torch.Tensor],
    box: list[float],
    batch: Batch,
    picture: Picture,
) -> Row:
    scale = ColorScale("attention", max(float(values.max()) for values in levels.values()))
    for name, values in levels.items():
        title = f"{name}: {float(values.sum()):.0%} of the attention"
        panels.append(picture.heat(title, values, batch.padded_size, [Mark(box, SKY, thin=True)]))
    return Row(panels, scale)
