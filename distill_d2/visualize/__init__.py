"""What a distillation loss looks at, drawn on images.

A method is one file of this folder; nothing else needs an edit:

    @method(loss="MeanFeature")  # the registered name
    def mean(loss, student, teacher, batch, picture: Picture) -> list[Row]:
        pairs = loss.pairs(student, teacher)
        ...
        return [Row([picture.ground_truth(), picture.heat("p3", ...)], ColorScale("error", 1.0))]

It is called in a step of training, on one image, with what the loss itself is given: the views of both
detectors and the Batch.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from typing import Any, Callable

from .picture import ColorScale, LegendEntry, Mark, Panel, Picture, Row

__all__ = [
    "ColorScale",
    "LegendEntry",
    "Mark",
    "Method",
    "Panel",
    "Picture",
    "Row",
    "load_methods",
    "method",
]


@dataclass(frozen=True)
class Method:
    """How to draw one registered loss: (loss, student view, teacher view, batch, picture) -> rows.

    ``shows_parameters``: whether what is drawn depends on the loss's own parameters.
    """

    name: str
    loss: str
    draw: Callable[..., list[Row]]
    shows_parameters: bool = True


METHODS: dict[str, Method] = {}


def method(*, loss: str, shows_parameters: bool = True) -> Callable:
    """Decorator: register a function that draws the loss of this registered name, under its own name.

    Raises:
        ValueError: there is a method of that name already.
    """

    def register(draw: Callable[..., Any]) -> Callable[..., Any]:
        name = draw.__name__
        if name in METHODS:
            raise ValueError(f"there are two methods named '{name}'")
        METHODS[name] = Method(name, loss, draw, shows_parameters)
        return draw

    return register


def load_methods() -> dict[str, Method]:
    """All methods by name: those of the files of this folder."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return METHODS
