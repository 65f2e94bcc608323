"""Knowledge distillation of object detectors on detectron2."""

from .known_warnings import silence_known_warnings

silence_known_warnings()

from .config import add_distill_config  # noqa: E402
from .distiller import Distiller  # noqa: E402
from .losses import DISTILL_LOSS_REGISTRY, DistillLoss  # noqa: E402
from .teacher import Teacher, build_teacher, load_teacher  # noqa: E402
from .views import DetectorView, register_view  # noqa: E402

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
