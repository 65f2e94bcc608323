"""What config keys may hold: one table per part of a config, and its check before anything is built.

A table maps the full name of a key to a rule (``kinds``). ``model`` has the table of detectron2's detectors, the
engine that of a run, a plugin's ``Detector.rules`` those of its own keys; ``LossSettings`` has the losses' keys.
"""

from .check import RuleError, check_rules, faults
from .context import Context
from .kinds import (
    COUNT,
    COUNT_OR_0,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    Anything,
    Choice,
    Flag,
    Integer,
    Levels,
    Number,
    Rule,
    Sequence,
    Text,
    Unused,
    norm,
    rule_of,
)
from .model import assertions_told, check_model, default_rules, model_relations, model_rules

__all__ = [
    "COUNT",
    "COUNT_OR_0",
    "FRACTION",
    "NOT_NEGATIVE",
    "POSITIVE",
    "Anything",
    "Choice",
    "Context",
    "Flag",
    "Integer",
    "Levels",
    "Number",
    "Rule",
    "RuleError",
    "Sequence",
    "Text",
    "Unused",
    "assertions_told",
    "check_model",
    "check_rules",
    "default_rules",
    "faults",
    "model_relations",
    "model_rules",
    "norm",
    "rule_of",
]
