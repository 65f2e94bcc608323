"""DeFeat in parts: the loss, its terms on classes, its settings."""

from .loss import DeFeat

__all__ = ["DeFeat"]
