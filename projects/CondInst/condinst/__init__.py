from distill_d2.projects.condinst_plugin import add_condinst_config

from .condinst import CondInst

__all__ = ["CondInst", "add_condinst_config"]
