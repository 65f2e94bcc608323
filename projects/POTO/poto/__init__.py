from distill_d2.projects.poto_plugin import add_poto_config

from .head import MaxFiltering, POTOHead
from .poto import POTO
from .view import POTOView

__all__ = ["MaxFiltering", "POTO", "POTOHead", "POTOView", "add_poto_config"]
