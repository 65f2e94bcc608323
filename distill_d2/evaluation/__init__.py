"""The evaluator that a dataset's metadata asks for."""

from .evaluators import VOCEvaluator, build_evaluator, evaluator_kind, with_model_evaluators

__all__ = ["VOCEvaluator", "build_evaluator", "evaluator_kind", "with_model_evaluators"]
