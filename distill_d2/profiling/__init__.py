"""How large and how fast detectors are, side by side."""

from .timing import milliseconds_per_image, time_ratio

__all__ = ["milliseconds_per_image", "time_ratio"]
