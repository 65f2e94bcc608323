"""Knowledge distillation of object detectors on detectron2."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .known_warnings import silence_known_warnings
from .requirements import require_detectron2, warn_without_detectron2

silence_known_warnings()
warn_without_detectron2()

__version__ = "0.2.0.dev0"

__all__ = [
    "DISTILL_LOSS_REGISTRY",
    "DetectorView",
    "DistillLoss",
    "Distiller",
    "Teacher",
    "add_distill_config",
    "build_teacher",
    "load_teacher",
    "register_view",
]

if TYPE_CHECKING:
    from .public import (
        DISTILL_LOSS_REGISTRY,
        DetectorView,
        Distiller,
        DistillLoss,
        Teacher,
        add_distill_config,
        build_teacher,
        load_teacher,
        register_view,
    )


def __getattr__(name: str) -> Any:
    """Import torch and detectron2 with the first name that needs them: the command's help does not."""
    if name in __all__:
        require_detectron2()
        return getattr(importlib.import_module(".public", __name__), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
