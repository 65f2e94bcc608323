"""Views: what distillation losses read of a detector, in one form for all kinds of detectors."""

from .base import DetectorView, build_view, register_view, view_type
from .batch import Batch
from .checks import require_same_boxes, require_same_classes
from .fcos import FCOSView
from .predictions import Predictions
from .rcnn import RCNNView
from .retinanet import RetinaNetView

__all__ = [
    "Batch",
    "DetectorView",
    "FCOSView",
    "Predictions",
    "RCNNView",
    "RetinaNetView",
    "build_view",
    "register_view",
    "require_same_boxes",
    "require_same_classes",
    "view_type",
]
