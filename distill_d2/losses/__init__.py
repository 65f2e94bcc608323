"""Distillation losses, one file per method; every module in this folder is imported, so that a
new file with a registered class is all that a new method needs."""

import importlib
import pkgutil

from .base import DISTILL_LOSS_REGISTRY, DistillLoss, build_losses, key_comments
from .pairing import FeaturePairs
from .settings import LossSettings, key

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "DISTILL_LOSS_REGISTRY",
    "DistillLoss",
    "FeaturePairs",
    "LossSettings",
    "build_losses",
    "key",
    "key_comments",
]
