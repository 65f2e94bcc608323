from .backbone import build_fcos_resnet_fpn_backbone
from .config import add_fcos_config

__all__ = ["add_fcos_config", "build_fcos_resnet_fpn_backbone"]
