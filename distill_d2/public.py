"""The public names of distill_d2, which import detectron2."""

from .config import add_distill_config
from .distiller import Distiller
from .losses import DISTILL_LOSS_REGISTRY, DistillLoss
from .teacher import Teacher, build_teacher, load_teacher
from .views import DetectorView, register_view

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
