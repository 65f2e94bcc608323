"""Boxes and heat maps on one image, at a size at which they can be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from detectron2.structures import Instances
from detectron2.utils.visualizer import VisImage, Visualizer
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patheffects import withStroke

#: Okabe and Ito's colours: apart for all kinds of colour vision, and light enough for text on black.
GREEN, SKY, YELLOW, VERMILLION, WHITE = "#009E73", "#56B4E9", "#F0E442", "#D55E00", "#FFFFFF"

COLOUR_MAP = "inferno"
_SHORTER_SIDE = 480  # of a panel, in pixels
_FONT_SIZE = 11  # points, at 100 dots per inch
_LETTER = (9.0, 18.0)  # about the width and height of a letter of it, in pixels
_LINE, _THIN_LINE = 2.2, 1.5  # points
_HEAT = 0.65  # how much of a pixel is the heat map's colour; the rest is the image's


@dataclass(frozen=True)
class Panel:
    """A titled image: (H, W, 3) RGB, uint8."""

    title: str
    image: np.ndarray


@dataclass(frozen=True)
class ColourScale:
    """What the colours of a row's heat maps mean: from 0 to ``top``."""

    label: str
    top: float


@dataclass(frozen=True)
class LegendEntry:
    """A line of this colour, and what it is."""

    label: str
    colour: str
    dashed: bool = False


@dataclass(frozen=True)
class Row:
    """Panels side by side, all of one size, with one colour scale and one legend."""

    panels: list[Panel]
    scale: ColourScale | None = None
    legend: Sequence[LegendEntry] = ()


@dataclass(frozen=True)
class Mark:
    """A box, (4,) XYXY in pixels of the image, and how it is drawn."""

    box: Sequence[float]
    colour: str
    label: str = ""
    dashed: bool = False
    thin: bool = False


@dataclass(frozen=True)
class Picture:
    """One image as the detectors see it, before padding, with its ground truth.

    Attributes:
        image: (H, W, 3) RGB, uint8.
        instances: gt_boxes and gt_classes.
        classes: names of the classes.
    """

    image: np.ndarray
    instances: Instances
    classes: Sequence[str]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels of the image."""
        return self.image.shape[:2]

    @property
    def zoom(self) -> float:
        """Pixels of a panel per pixel of the image."""
        return _SHORTER_SIDE / min(self.size)

    def class_name(self, index: int) -> str:
        return self.classes[index] if index < len(self.classes) else f"class {index}"

    def ground_truth(self, title: str = "ground truth") -> Panel:
        """All boxes with the names of their classes; their number follows the title."""
        boxes, classes = self.instances.gt_boxes.tensor.tolist(), self.instances.gt_classes.tolist()
        marks = [Mark(box, GREEN, self.class_name(label)) for box, label in zip(boxes, classes)]
        return Panel(f"{title} ({len(marks)})", self.boxes(marks))

    def boxes(self, marks: Sequence[Mark]) -> np.ndarray:
        """The image with boxes, the first on top: (H zoom, W zoom, 3)."""
        canvas = self._canvas(self.image)
        self._draw(canvas, marks)
        return canvas.output.get_image()

    def heat(
        self,
        values: torch.Tensor,
        padded_size: tuple[int, int],
        scale: ColourScale,
        marks: Sequence[Mark] = (),
    ) -> np.ndarray:
        """The grey image under the colours of a level's values: (H zoom, W zoom, 3).

        Args:
            values: (h, w), of a level that covers the padded image; what is in the padding is cut off.
            padded_size: (height, width) in pixels.
            marks: boxes on top.
        """
        grey = np.repeat(cv2.cvtColor(self.image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
        canvas, (height, width) = self._canvas(grey), padded_size
        axes = canvas.output.ax
        limits = axes.get_xlim(), axes.get_ylim()
        axes.imshow(
            values.detach().float().cpu().numpy(),
            extent=(0, width * self.zoom, height * self.zoom, 0),
            cmap=COLOUR_MAP,
            vmin=0.0,
            vmax=scale.top,
            alpha=_HEAT,
            interpolation="nearest",  # the level's own cells
        )
        axes.set(xlim=limits[0], ylim=limits[1])
        self._draw(canvas, marks)
        return canvas.output.get_image()

    def visible(self, values: torch.Tensor, padded_size: tuple[int, int]) -> torch.Tensor:
        """The part of a level's values (h, w) that ``heat`` shows."""
        rows, columns = (
            -(-side * cells // padded)
            for side, cells, padded in zip(self.size, values.shape, padded_size)
        )
        return values[:rows, :columns]

    def _canvas(self, image: np.ndarray) -> Visualizer:
        height, width = (round(side * self.zoom) for side in self.size)
        how = cv2.INTER_AREA if self.zoom < 1 else cv2.INTER_CUBIC
        return Visualizer(cv2.resize(image, (width, height), interpolation=how))

    def _draw(self, canvas: Visualizer, marks: Sequence[Mark]) -> None:
        for mark in reversed(marks):
            _draw_box(canvas, np.asarray(mark.box) * self.zoom, mark)
        taken: list[np.ndarray] = []
        for mark in (mark for mark in marks if mark.label):
            place = _free_place(np.asarray(mark.box) * self.zoom, mark.label, taken, canvas.output)
            taken.append(place)
            canvas.draw_text(
                mark.label,
                tuple(place[:2] + 2),
                font_size=_FONT_SIZE,
                color=mark.colour,
                horizontal_alignment="left",
            )


def _draw_box(canvas: Visualizer, box: np.ndarray, mark: Mark) -> None:
    style = (0, (4, 2)) if mark.dashed else "-"
    canvas.draw_box(box, alpha=1.0, edge_color=mark.colour, line_style=style)
    line, width = canvas.output.ax.patches[-1], _THIN_LINE if mark.thin else _LINE
    line.set_linewidth(width)
    # A dark rim: seen on any image.
    line.set_path_effects([withStroke(linewidth=width + 1.4, foreground="black")])


def _free_place(box: np.ndarray, label: str, taken: list[np.ndarray], canvas: VisImage) -> np.ndarray:
    """Where to put a box's label, XYXY: at a corner, where it covers other labels least."""
    (x1, y1, x2, y2), (letter, height) = box, _LETTER
    width = letter * len(label) + 4
    corners = [(x, y) for y in (y1 - height, y2, y1, y2 - height) for x in (x1, x2 - width)]
    limit = np.array([canvas.width - width, canvas.height - height])
    places = [np.clip(corner, 0, np.maximum(limit, 0)) for corner in corners]
    places = [np.concatenate([place, place + (width, height)]) for place in places]
    return min(places, key=lambda place: sum(_overlap(place, other) for other in taken))


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    return float(sides.clip(min=0).prod())


def colours_of(scale: ColourScale) -> ScalarMappable:
    """For a colour bar."""
    return ScalarMappable(Normalize(0.0, scale.top), COLOUR_MAP)
