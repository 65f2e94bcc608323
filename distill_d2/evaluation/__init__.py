"""The evaluator that a dataset's metadata asks for."""

from .evaluators import VOCEvaluator, build_evaluator

__all__ = ["VOCEvaluator", "build_evaluator"]
