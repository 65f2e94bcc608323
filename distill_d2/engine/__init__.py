"""Training and evaluation: from a command line to a checkpoint of a better student."""

from .config_loading import load_config
from .launch import argument_parser, launch
from .main import evaluate, main
from .optimizer import build_optimizer
from .settings import RunSettings
from .setup import setup
from .trainer import DistillTrainer

__all__ = [
    "DistillTrainer",
    "RunSettings",
    "argument_parser",
    "build_optimizer",
    "evaluate",
    "launch",
    "load_config",
    "main",
    "setup",
]
