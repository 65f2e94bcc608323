"""Rows of panels below a header, as one image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .picture import Row, colours_of

_DPI = 100
# All in pixels.
_MIN_WIDTH = 1000  # of header and legend
_GAP = 14
_TITLE = 26
_LEGEND = 34
_HEADER_LINE = 24
_BAR, _BAR_WITH_NUMBERS = 16, 110


def compose(rows: Sequence[Row], header: Sequence[str]) -> np.ndarray:
    """(H, W, 3) RGB, uint8: the lines of the header, then the rows one below the other."""
    width = max(_MIN_WIDTH, max(_width(row) for row in rows) + 2 * _GAP)
    top = len(header) * _HEADER_LINE + _GAP
    height = top + sum(_height(row) for row in rows) + _GAP
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    sheet = _Sheet(figure, width, height)
    for index, line in enumerate(header):
        sheet.text(line, _GAP, _GAP // 2 + index * _HEADER_LINE, bold=index == 0)
    for row in rows:
        sheet.row(row, top)
        top += _height(row)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _width(row: Row) -> int:
    panels = sum(panel.image.shape[1] + _GAP for panel in row.panels)
    return panels + (_BAR_WITH_NUMBERS if row.scale else 0)


def _height(row: Row) -> int:
    return _TITLE + row.panels[0].image.shape[0] + (_LEGEND if row.legend else 0) + _GAP


class _Sheet:
    """A figure with coordinates in pixels from its upper left corner."""

    def __init__(self, figure: Figure, width: int, height: int):
        self.figure, self.width, self.height = figure, width, height

    def text(self, text: str, x: int, y: int, bold: bool = False) -> None:
        weight = "bold" if bold else "normal"
        at = self._place(x, y)
        self.figure.text(*at, text, size=12, weight=weight, verticalalignment="top", parse_math=False)

    def row(self, row: Row, top: int) -> None:
        left = _GAP
        for panel in row.panels:
            height, width = panel.image.shape[:2]
            self.text(panel.title, left, top + 2)
            bottom = self.height - top - _TITLE - height
            self.figure.figimage(panel.image, left, bottom, origin="upper", resize=False)
            left += width + _GAP
        height = row.panels[0].image.shape[0]
        if row.scale:
            self._colour_bar(row, left, top + _TITLE, height)
        if row.legend:
            self._legend(row, top + _TITLE + height)

    def _colour_bar(self, row: Row, left: int, top: int, height: int) -> None:
        x, y = self._place(left, top + height)
        axes = self.figure.add_axes([x, y, _BAR / self.width, height / self.height])
        self.figure.colorbar(colours_of(row.scale), cax=axes, label=row.scale.label)

    def _legend(self, row: Row, top: int) -> None:
        lines: list[Line2D] = [
            Line2D([], [], color=e.colour, linestyle="--" if e.dashed else "-", linewidth=3)
            for e in row.legend
        ]
        legend = self.figure.legend(
            lines,
            [entry.label for entry in row.legend],
            loc="upper left",
            bbox_to_anchor=self._place(_GAP, top + 4),
            borderaxespad=0.0,
            ncol=len(lines),
            fontsize=11,
            facecolor="0.25",  # light colours are seen on it
            labelcolor="white",
        )
        legend.set_in_layout(False)

    def _place(self, x: int, y: int):
        return x / self.width, 1 - y / self.height
