from .config import add_solov2_config

__all__ = ["add_solov2_config"]
