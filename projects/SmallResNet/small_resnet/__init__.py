from distill_d2.projects.small_resnet_plugin import add_small_resnet_config

from .small_resnet import build_small_resnet_backbone

__all__ = ["add_small_resnet_config", "build_small_resnet_backbone"]
