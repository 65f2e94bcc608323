from distill_d2.projects.timm_backbone_plugin import add_timm_config

from .backbone import TimmBackbone
from .building import build_timm_backbone, build_timm_fpn_backbone
from .simple_pyramid import SimplePyramid
from .vit import TimmViT

__all__ = [
    "SimplePyramid",
    "TimmBackbone",
    "TimmViT",
    "add_timm_config",
    "build_timm_backbone",
    "build_timm_fpn_backbone",
]
