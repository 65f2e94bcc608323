from .backbone import add_bottleneck_config, build_bottleneck_backbone, inject_bottleneck
from .stage import BottleneckStage

__all__ = [
    "BottleneckStage",
    "add_bottleneck_config",
    "build_bottleneck_backbone",
    "inject_bottleneck",
]
