"""What the weights of a backbone say of the images that they were trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .packages import PACKAGES, package_of
from .requirement import import_timm


@dataclass(frozen=True)
class Description:
    """Of images.

    Attributes:
        source: of which weights, for messages.
        mean, std: per channel, of values 0 to 255.
        format: the channels' order.
    """

    source: str
    mean: Sequence[float]
    std: Sequence[float]
    format: str = "RGB"

    def expected(self, name: str, value: Any) -> str:
        """In words, what ``value`` should have been; "" if it is right.

        Args:
            name: "mean", "std" or "format".
        """
        right = getattr(self, name)
        if isinstance(right, str):
            same, text = value == right, repr(right)
        else:
            # Configs round to a few digits.
            same = len(value) == len(right) and all(
                math.isclose(a, b, abs_tol=0.05) for a, b in zip(value, right)
            )
            text = str(list(right))
        return "" if same else f"{text}, with which {self.source} were trained"


def described(name: str, weights: str) -> Description | None:
    """The description of weights; None where they have none: random ones, and those of files and other packages.

    Args:
        name, weights: MODEL.TIMM.NAME and WEIGHTS.

    Raises:
        ImportError: timm, which has the description, is not installed.
        ValueError: timm has no weights of this name.
    """
    if weights == "timm":
        return of_timm(name)
    package = PACKAGES.get(package_of(weights))
    if package is None:
        return None
    return Description(f"the weights of {weights}", package.mean, package.std)


def of_timm(name: str) -> Description:
    """Of timm's own weights of a model. Raises ImportError and ValueError: see ``described``."""
    import_timm()
    from timm.models import get_pretrained_cfg

    try:
        found = get_pretrained_cfg(name)
    except RuntimeError:  # a tag that timm does not have
        found = None
    if found is None or not found.has_weights:
        raise ValueError(
            f"MODEL.TIMM.NAME is '{name}', of which timm has no weights (MODEL.TIMM.WEIGHTS is 'timm'); "
            "timm.list_pretrained() lists those that it has"
        )
    mean, std = ([round(255 * each, 3) for each in values] for values in (found.mean, found.std))
    tag = f"{found.architecture}.{found.tag}" if found.tag else name
    return Description(f"timm's weights of {tag}", mean, std)
