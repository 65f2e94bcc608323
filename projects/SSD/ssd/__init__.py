from distill_d2.projects.ssd_plugin import add_ssd_config

from .mobilenet_v2 import SSDMobileNetV2, build_ssd_mobilenet_v2_backbone
from .ssd import SSD
from .vgg import SSDVGG16, build_ssd_vgg16_backbone
from .view import SSDView

__all__ = [
    "SSD",
    "SSDMobileNetV2",
    "SSDVGG16",
    "SSDView",
    "add_ssd_config",
    "build_ssd_mobilenet_v2_backbone",
    "build_ssd_vgg16_backbone",
]
