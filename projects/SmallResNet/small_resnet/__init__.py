from .small_resnet import add_small_resnet_config, build_small_resnet_backbone

__all__ = ["add_small_resnet_config", "build_small_resnet_backbone"]
