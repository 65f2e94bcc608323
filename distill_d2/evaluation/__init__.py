"""The evaluator that a dataset's metadata asks for."""

from .evaluators import build_evaluator, evaluator_kind, with_model_evaluators
from .trial import try_evaluator
from .voc import VOCEvaluator

__all__ = ["VOCEvaluator", "build_evaluator", "evaluator_kind", "try_evaluator", "with_model_evaluators"]
