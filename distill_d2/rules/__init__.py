"""What config keys may hold: tables of rules, which are checked before anything is built.

A table maps the full name of a key to a rule. A plugin gives its own as ``Detector.rules``, for example

    {"MODEL.MY_DETECTOR.SCALE": Number(above=0), "MODEL.MY_DETECTOR.IN_FEATURES": Levels()}

Keys without a rule keep the type of their default. ``model`` has the table of detectron2's detectors, the engine
that of a run; losses state the rules of their keys in ``LossSettings``. A new kind of rule derives from ``Rule``.
"""

from .check import RuleError, check_rules, faults
from .context import Context
from .kinds import (
    COUNT,
    COUNT_OR_0,
    COUNT_OR_ALL,
    FRACTION,
    NORM,
    NOT_NEGATIVE,
    OVERLAP,
    POSITIVE,
    PROBABILITY,
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
    kind_of,
    rule_of,
)
from .model import (
    ARCHITECTURE,
    assertions_told,
    check_model,
    default_rules,
    model_relations,
    model_rules,
)

__all__ = [
    "ARCHITECTURE",
    "COUNT",
    "COUNT_OR_0",
    "COUNT_OR_ALL",
    "FRACTION",
    "NORM",
    "NOT_NEGATIVE",
    "OVERLAP",
    "POSITIVE",
    "PROBABILITY",
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
    "kind_of",
    "rule_of",
]
