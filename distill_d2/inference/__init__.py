"""Trained detectors without their training: from a run's folder, or one file, to detections on images."""

from .sources import Source, build_detector, find_run
from .trained import Trained, load_source, load_trained

__all__ = ["Source", "Trained", "build_detector", "find_run", "load_source", "load_trained"]
