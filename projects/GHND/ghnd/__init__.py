from distill_d2.projects.ghnd_plugin import add_bottleneck_config

from .backbone import build_bottleneck_backbone, inject_bottleneck
from .stage import BottleneckStage

__all__ = [
    "BottleneckStage",
    "add_bottleneck_config",
    "build_bottleneck_backbone",
    "inject_bottleneck",
]
