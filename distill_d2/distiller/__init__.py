"""The Distiller: a student that learns from a frozen teacher while it is trained as usual."""

from .building import node_arguments, use_statistics
from .model import Distiller

__all__ = ["Distiller", "node_arguments", "use_statistics"]
