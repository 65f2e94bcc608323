"""Rows of panels below a header, as one figure."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torchvision.ops import box_iou

from .picture import ColorScale, Mark, Panel, Row

COLOR_MAP = "inferno"
HEAT = 0.65  # how much of a pixel is the heat map's color; the rest is the image's
_SHORTER_SIDE, _LONGER_SIDE = 4.8, 12.0  # of a panel, in inches of 100 pixels; the longer at most
_FONT_SIZE = 11
_LETTER = (0.09, 0.18)  # about the width and height of a letter of it, in inches
_LINE, _THIN_LINE = 2.2, 1.5  # points


def compose(rows: Sequence[Row], header: Sequence[str]) -> Figure:
    """The lines of the header, then the rows one below the other; a drawn figure, to be saved."""
    height, width = rows[0].panels[0].image.shape[:2]
    inches = min(_SHORTER_SIDE / min(height, width), _LONGER_SIDE / max(height, width))  # per pixel
    columns = max(len(row.panels) for row in rows)
    size = (columns * (width * inches + 0.1) + 1.2, len(rows) * (height * inches + 0.8) + 0.9)
    figure = Figure(figsize=(max(size[0], 8.0), size[1]), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle("\n".join(header), x=0.01, ha="left", size=12, parse_math=False)
    for part, row in zip(figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows):
        axes = part.subplots(1, columns, squeeze=False)[0]
        for each in axes:
            each.set_axis_off()
        for each, panel in zip(axes, row.panels):
            _draw(each, panel, row.scale, inches)
        if row.scale:
            colors = ScalarMappable(Normalize(0.0, row.scale.top), COLOR_MAP)
            part.colorbar(colors, ax=list(axes), label=row.scale.label, pad=0.01, aspect=30)
        if row.legend:
            # Light colors are seen on a dark ground.
            part.legend(
                [Line2D([], [], color=e.color, ls="--" if e.dashed else "-", lw=3) for e in row.legend],
                [entry.label for entry in row.legend],
                loc="outside lower left",
                ncols=len(row.legend),
                facecolor="0.25",
                labelcolor="white",
            )
    canvas.draw()
    return figure


def _draw(axes: Axes, panel: Panel, scale: ColorScale | None, inches: float) -> None:
    axes.set_title(panel.title, loc="left", size=12, parse_math=False)
    height, width = panel.image.shape[:2]
    extent = (0, width, height, 0)
    if panel.heat is None:
        axes.imshow(panel.image, extent=extent)
    else:
        gray = cv2.cvtColor(panel.image, cv2.COLOR_RGB2GRAY)
        axes.imshow(gray, cmap="gray", vmin=0, vmax=255, extent=extent)
        padded_height, padded_width = panel.padded_size
        axes.imshow(
            panel.heat,
            extent=(0, padded_width, padded_height, 0),
            cmap=COLOR_MAP,
            vmin=0.0,
            vmax=scale.top if scale else None,
            alpha=HEAT,
            interpolation="nearest",  # the level's own cells
        )
        axes.set(xlim=(0, width), ylim=(height, 0))
    for mark in reversed(panel.marks):
        _draw_box(axes, mark)
    taken = torch.zeros(0, 4)
    for mark in panel.marks:
        if mark.label:
            place = _free_place(mark, taken, (height, width), inches)
            taken = torch.cat([taken, place[None]])
            x, y = place[:2].tolist()
            axes.text(
                x,
                y,
                mark.label,
                size=_FONT_SIZE,
                color=mark.color,
                va="top",
                bbox={"facecolor": "black", "alpha": 0.85, "pad": 1, "linewidth": 0},
            )


def _draw_box(axes: Axes, mark: Mark) -> None:
    x1, y1, x2, y2 = mark.box
    width = _THIN_LINE if mark.thin else _LINE
    line = Rectangle(
        (x1, y1),
        x2 - x1,
        y2 - y1,
        fill=False,
        edgecolor=mark.color,
        linewidth=width,
        linestyle=(0, (4, 2)) if mark.dashed else "-",
        path_effects=[withStroke(linewidth=width + 1.4, foreground="black")],  # seen on any image
    )
    axes.add_patch(line)


def _free_place(mark: Mark, taken: torch.Tensor, size: tuple[int, int], inches: float) -> torch.Tensor:
    """Where to put a box's label, (4,) XYXY in pixels of the image: at a corner, where it covers the
    labels ``taken`` (n, 4) least."""
    (x1, y1, x2, y2), (height, width) = mark.box, size
    length, line = _LETTER[0] * (len(mark.label) + 1) / inches, _LETTER[1] / inches
    corners = [(x, y) for y in (y1 - line, y2, y1, y2 - line) for x in (x1, x2 - length)]
    places = torch.tensor([[x, y, x + length, y + line] for x, y in corners])
    shift = -places[:, :2].clamp(max=0) - (places[:, 2:] - torch.tensor([width, height])).clamp(min=0)
    places = places + shift.repeat(1, 2)
    return places[box_iou(places, taken).sum(dim=1).argmin()]
