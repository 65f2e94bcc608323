from distill_d2.projects.solov2_plugin import add_solov2_config

from .head import SOLOv2InstanceHead, SOLOv2MaskHead
from .inference import InstanceSelection
from .solov2 import SOLOv2
from .targets import GridTargets
from .view import SOLOv2View

__all__ = [
    "GridTargets",
    "InstanceSelection",
    "SOLOv2",
    "SOLOv2InstanceHead",
    "SOLOv2MaskHead",
    "SOLOv2View",
    "add_solov2_config",
]
