"""timm, which is an extra of the package."""

from __future__ import annotations

import importlib
from types import ModuleType


def import_timm() -> ModuleType:
    """timm. Raises ImportError, whose message says what to install."""
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise ImportError(
            "the backbones build_timm_backbone and build_timm_fpn_backbone (MODEL.BACKBONE.NAME) need timm, which "
            "is not installed: pip install 'distill_d2[timm]'",
            name="timm",
        ) from error
