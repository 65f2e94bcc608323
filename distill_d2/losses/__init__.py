"""Distillation losses, one file per method; every module in this folder is imported, so that a
new file with a registered class is all that a new method needs."""

import importlib
import pkgutil
from typing import Any

from .base import DISTILL_LOSS_REGISTRY, DistillLoss, build_losses, key_comments
from .pairing import FeaturePairs
from .settings import LossSettings, key
from .trained import TrainedLoss

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def __getattr__(name: str) -> Any:
    """A registered loss: ``from distill_d2.losses import PKD``."""
    if name in DISTILL_LOSS_REGISTRY:
        return DISTILL_LOSS_REGISTRY.get(name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


__all__ = [
    "DISTILL_LOSS_REGISTRY",
    "DistillLoss",
    "FeaturePairs",
    "LossSettings",
    "TrainedLoss",
    "build_losses",
    "key",
    "key_comments",
]
