"""The settings of a loss: a frozen dataclass, whose fields are the keys of its config node."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import Field, dataclass, field, fields
from typing import Any

import numpy as np
from detectron2.config import CfgNode

from ..rules import Anything, Choice, Context, Integer, Number, Rule, Sequence, Text, rule_of

#: Comment of a setting that names levels.
IN_FEATURES = "Neck levels (p3) or backbone stages (res4); empty: all neck levels that both have."


@dataclass(frozen=True)
class Key:
    """The comment, the node and the allowed values of a setting.

    Attributes:
        comment: one or two sentences for the reader of a config.
        node: config node below MODEL.DISTILLER, "" for MODEL.DISTILLER itself; None: the loss's own.
        choices: the allowed values; None: any.
        at_least, above, at_most, below: bounds of a number.
        odd: only odd numbers.
    """

    comment: str = ""
    node: str | None = None
    choices: tuple[Any, ...] | None = None
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    odd: bool = False

    def rule(self, setting: Field) -> Rule:
        """What a setting may hold: a value of its default's type or, where a default leaves that open, of its
        annotation's."""
        default, annotation = setting.default, str(setting.type)
        if self.choices is not None:
            return Choice(self.choices)
        if isinstance(default, (int, float)) and not isinstance(default, bool):
            bounds = {name: getattr(self, name) for name in ("at_least", "above", "at_most", "below")}
            whole = isinstance(default, int) and "float" not in annotation
            return Integer(**bounds, odd=self.odd) if whole else Number(**bounds)
        if isinstance(default, tuple) and "str" in annotation:
            return Sequence(Text())
        if isinstance(default, tuple) and ("float" in annotation or "int" in annotation):
            return Sequence(Number())
        return rule_of(default) if isinstance(default, (bool, str)) else Anything()


def is_finite(value: Any) -> bool:
    """Whether this is a finite number, one of numpy's for example."""
    return isinstance(value, (int, float, np.integer, np.floating)) and math.isfinite(value)


def key(default: Any, comment: str, *, choices: Iterable[Any] | None = None, **rules: Any) -> Any:
    """A field of LossSettings.

    Args:
        default: of the setting, and of its config key (a tuple is a list there).
        comment, choices, rules: see Key.
    """
    allowed = None if choices is None else tuple(choices)
    return field(default=default, metadata={"key": Key(comment, choices=allowed, **rules)})


def no_key(default: Any) -> Any:
    """A field of LossSettings that has no config key, and that the loss does not take as an argument."""
    return field(default=default, metadata={"key": None})


class SettingError(ValueError):
    """A setting has a value that it may not have.

    Attributes:
        name: of the setting.
        problem: "is ...; expected ...".
    """

    def __init__(self, name: str, value: Any, expected: str):
        self.name = name
        self.problem = f"is {value!r}; expected {expected}"
        super().__init__(f"{name.upper()} {self.problem}")


@dataclass(frozen=True)
class LossSettings:
    """The settings of every loss; a loss adds its own in a subclass.

    A value has the type of the default, and numbers are finite. Rules of one field are stated in ``key``,
    others in ``__post_init__``.

    Raises:
        SettingError: a value is not allowed; the message names the key.
    """

    weight: float = key(1.0, "Multiplies all terms of the loss.", at_least=0)
    gradient_ratio: float = key(
        0.0,
        "Above 0: the weight is measured when the training starts, such that the loss's gradient in the "
        "student's backbone and neck is this many times the task's; WEIGHT does not matter.",
        at_least=0,
    )
    gradient_ratio_iters: int = key(
        -1,
        "Above 0: measure it again after 1, 2, 4, ... iterations with the loss, up to this many; before the last "
        "time it is at most WEIGHT. -1: 200 where adapters start almost at 0, so that gradients grow with "
        "them, else 0.",
        at_least=-1,
    )
    start_iter: int = key(0, "First iteration (from 0) with the loss.", at_least=0)
    stop_iter: int = key(-1, "First iteration without the loss; -1: it never stops.", at_least=-1)
    warmup_iters: int = key(
        0, "From START_ITER on, WEIGHT is reached linearly in this many iterations.", at_least=0
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            rule = (each.metadata.get("key") or Key()).rule(each)
            expected = rule.expected(getattr(self, each.name), Context(CfgNode()))
            self.require(each.name, not expected, expected)
        stops_later = self.stop_iter < 0 or self.stop_iter > self.start_iter
        self.require("stop_iter", stops_later, f"-1 or above START_ITER, which is {self.start_iter}")

    def require(self, name: str, holds: bool, expected: str) -> None:
        """Check a setting.

        Raises:
            SettingError: the condition does not hold.
        """
        if not holds:
            raise SettingError(name, getattr(self, name), expected)


def keys_of(settings: type[LossSettings]) -> dict[str, Key]:
    """The Key of each setting that is a config key, by its name."""
    keys = {each.name: each.metadata.get("key", Key()) for each in fields(settings)}
    return {name: known for name, known in keys.items() if known is not None}
