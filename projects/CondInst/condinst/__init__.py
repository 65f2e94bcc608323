from .condinst import CondInst
from .config import add_condinst_config

__all__ = ["CondInst", "add_condinst_config"]
