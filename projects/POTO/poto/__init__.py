from .config import add_poto_config

__all__ = ["add_poto_config"]
