"""What is drawn of one image: panels with boxes and heat maps, in rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.structures import Instances

#: Okabe and Ito's colors: apart for all kinds of color vision, and light enough for text on black.
GREEN, SKY, YELLOW, VERMILION, WHITE = "#009E73", "#56B4E9", "#F0E442", "#D55E00", "#FFFFFF"


@dataclass(frozen=True)
class Mark:
    """A box, (4,) XYXY in pixels of the image, and how it is drawn."""

    box: Sequence[float]
    color: str
    label: str = ""
    dashed: bool = False
    thin: bool = False


@dataclass(frozen=True)
class Panel:
    """A titled image with boxes, the first on top, and a heat map below them.

    Attributes:
        image: (H, W, 3) RGB, uint8.
        heat: (h, w), the values of a level that covers the padded image; drawn over the gray image.
        padded_size: (height, width) in pixels of the padded image.
    """

    title: str
    image: np.ndarray
    marks: Sequence[Mark] = ()
    heat: torch.Tensor | None = None
    padded_size: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class ColorScale:
    """What the colors of a row's heat maps mean: from 0 to ``top``."""

    label: str
    top: float


@dataclass(frozen=True)
class LegendEntry:
    """A line of this color, and what it stands for."""

    label: str
    color: str
    dashed: bool = False


@dataclass(frozen=True)
class Row:
    """Panels side by side, all of one size, with one color scale and one legend."""

    panels: list[Panel]
    scale: ColorScale | None = None
    legend: Sequence[LegendEntry] = ()


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
        """(height, width) in pixels."""
        return self.image.shape[:2]

    def class_name(self, index: int) -> str:
        return self.classes[index] if index < len(self.classes) else f"class {index}"

    def ground_truth(self, title: str = "ground truth") -> Panel:
        """All boxes with the names of their classes; their number follows the title."""
        boxes, classes = self.instances.gt_boxes.tensor.tolist(), self.instances.gt_classes.tolist()
        marks = [Mark(box, GREEN, self.class_name(label)) for box, label in zip(boxes, classes)]
        return self.boxes(f"{title} ({len(marks)})", marks)

    def boxes(self, title: str, marks: Sequence[Mark]) -> Panel:
        return Panel(title, self.image, marks)

    def heat(
        self,
        title: str,
        values: torch.Tensor,
        padded_size: tuple[int, int],
        marks: Sequence[Mark] = (),
    ) -> Panel:
        """The gray image under the colors of a level's values (h, w); see Panel."""
        return Panel(title, self.image, marks, values.detach().float().cpu(), padded_size)

    def visible(self, values: torch.Tensor, padded_size: tuple[int, int]) -> torch.Tensor:
        """The part of a level's values (h, w) that lies on the image, not on its padding."""
        rows, columns = (
            -(-side * cells // padded)
            for side, cells, padded in zip(self.size, values.shape, padded_size)
        )
        return values[:rows, :columns]
