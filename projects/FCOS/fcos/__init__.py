from distill_d2.projects.fcos_plugin import add_fcos_config

from .backbone import (
    build_fcos_dla_fpn_backbone,
    build_fcos_resnet_bifpn_backbone,
    build_fcos_resnet_fpn_backbone,
)
from .bifpn import BiFPN
from .dla import DLA34
from .fcos import FCOS
from .one_stage_detector import OneStageDetector
from .view import OneStageDetectorView

__all__ = [
    "FCOS",
    "BiFPN",
    "DLA34",
    "OneStageDetector",
    "OneStageDetectorView",
    "add_fcos_config",
    "build_fcos_dla_fpn_backbone",
    "build_fcos_resnet_bifpn_backbone",
    "build_fcos_resnet_fpn_backbone",
]
