"""Kinds of rules: the type, range and choices of one key."""

from __future__ import annotations

import difflib
import math
from collections import abc
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Callable, ClassVar

import numpy as np
from detectron2.config import CfgNode
from fvcore.common.registry import Registry

from .context import Context


def is_list(value: Any) -> bool:
    """Whether this is a list, a tuple or an omegaconf's list."""
    return isinstance(value, abc.Sequence) and not isinstance(value, str)


class Rule:
    """What a key may hold."""

    def expected(self, value: Any, context: Context) -> str:
        """In words, what a value that is not allowed should have been; "" if it is allowed."""
        raise NotImplementedError


@dataclass(frozen=True)
class Anything(Rule):
    """Every value, of a key that another place checks."""

    def expected(self, value: Any, context: Context) -> str:
        return ""


@dataclass(frozen=True)
class Flag(Rule):
    def expected(self, value: Any, context: Context) -> str:
        return "" if isinstance(value, (bool, np.bool_)) else "True or False"


@dataclass(frozen=True)
class Text(Rule):
    """A string.

    Attributes:
        empty: "" is allowed.
    """

    empty: bool = True

    def expected(self, value: Any, context: Context) -> str:
        right = isinstance(value, str) and (self.empty or bool(value))
        return "" if right else 'text ("" for none)' if self.empty else "text that is not empty"


@dataclass(frozen=True)
class Number(Rule):
    """A finite number within bounds.

    Attributes:
        at_least, above, at_most, below: the bounds.
        also: further values that are allowed, such as None or -1.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    also: tuple[Any, ...] = ()

    name: ClassVar[str] = "a finite number"
    types: ClassVar[tuple[type, ...]] = (int, float, np.integer, np.floating)

    def expected(self, value: Any, context: Context) -> str:
        if any(value is each or (self._is_number(value) and value == each) for each in self.also):
            return ""
        return "" if self._is_number(value) and self._within(value) else self._words()

    def _is_number(self, value: Any) -> bool:
        return isinstance(value, self.types) and not isinstance(value, bool)

    def _within(self, value: Any) -> bool:
        return (
            math.isfinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def _words(self) -> str:
        names = ("at_least", "above", "at_most", "below")
        bounds = [(name.replace("_", " "), getattr(self, name)) for name in names]
        text = " and ".join(f"{name} {bound}" for name, bound in bounds if bound is not None)
        also = "".join(f", or {each}" for each in self.also)
        return self.name + (f", {text}" if text else "") + also


@dataclass(frozen=True)
class Integer(Number):
    """An integer within bounds.

    Attributes:
        odd: only odd numbers.
    """

    odd: bool = False

    name: ClassVar[str] = "an integer"
    types: ClassVar[tuple[type, ...]] = (int, np.integer)

    def _within(self, value: Any) -> bool:
        return super()._within(value) and not (self.odd and value % 2 == 0)

    def _words(self) -> str:
        words = super()._words()
        return words.replace(self.name, "an odd number") if self.odd else words


POSITIVE, NOT_NEGATIVE, FRACTION = Number(above=0), Number(at_least=0), Number(at_least=0, at_most=1)
PROBABILITY, OVERLAP = Number(above=0, below=1), Number(above=0, at_most=1)
COUNT, COUNT_OR_0, COUNT_OR_ALL = (
    Integer(at_least=1),
    Integer(at_least=0),
    Integer(at_least=1, also=(-1,)),
)


@dataclass(frozen=True)
class Choice(Rule):
    """One of some values.

    Attributes:
        choices: the values, a registry, or a function from a context to values.
        also: further values.
    """

    choices: Iterable[Any] | Registry | Callable[[Context], Iterable[Any]]
    also: tuple[Any, ...] = ()

    def expected(self, value: Any, context: Context) -> str:
        if isinstance(self.choices, Registry) and isinstance(value, str):
            try:
                self.choices.get(value)  # imports the module of a plugin that registers the name
                return ""
            except KeyError:
                pass
        known = self.known(context)
        if any(type(value) is type(each) and value == each for each in known):
            return ""
        names = [each for each in known if isinstance(each, str)]
        close = difflib.get_close_matches(value, names, n=3) if isinstance(value, str) else []
        return f"one of {known}" + (f"; the closest are {close}" if close else "")

    def known(self, context: Context) -> list[Any]:
        """All values."""
        if isinstance(self.choices, Registry):
            return [*self.also, *sorted(name for name, _ in self.choices)]
        choices = self.choices(context) if callable(self.choices) else self.choices
        return [*self.also, *choices]


#: What detectron2's get_norm builds.
NORM = Choice(("", "BN", "SyncBN", "FrozenBN", "GN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N", "LN"))


@dataclass(frozen=True)
class Sequence(Rule):
    """A list or tuple.

    Attributes:
        item: the rule of its items.
        count: how many there are: numbers, or a function from a context to them.
        least: how many there are at least.
        rising, not_falling: each is above the one before, or not below it.
        unique: none is repeated.
        alone: one item may stand without a list.
    """

    item: Rule = Anything()
    count: Iterable[int] | Callable[[Context], Iterable[int]] = ()
    least: int = 0
    rising: bool = False
    not_falling: bool = False
    unique: bool = False
    alone: bool = False

    def expected(self, value: Any, context: Context) -> str:
        if self.alone and not is_list(value):
            return self.item.expected(value, context)
        counts = list(self.count(context) if callable(self.count) else self.count)
        return "" if self._allows(value, counts, context) else self._words(value, counts, context)

    def _allows(self, value: Any, counts: list[int], context: Context) -> bool:
        if not is_list(value) or len(value) < self.least or (counts and len(value) not in counts):
            return False
        if any(self.item.expected(each, context) for each in value):
            return False
        pairs = list(zip(value, value[1:]))
        return (
            (not self.rising or all(a < b for a, b in pairs))
            and (not self.not_falling or all(a <= b for a, b in pairs))
            and (not self.unique or len(set(value)) == len(value))
        )

    def _words(self, value: Any, counts: list[int], context: Context) -> str:
        if self == Sequence():
            return "a list, such as [a, b], or [] for none"
        number = " or ".join(map(str, counts)) or (f"{self.least} or more" if self.least else "")
        text = f"a list of {number} values" if number else "a list"
        wrong = value if is_list(value) else (value,)
        wanted = [words for each in wrong if (words := self.item.expected(each, context))]
        text += f", each {wanted[0]}" if wanted else ""
        text += ", each above the one before" if self.rising else ""
        text += ", none below the one before" if self.not_falling else ""
        return text + (", none repeated" if self.unique else "")


@dataclass(frozen=True)
class Levels(Rule):
    """Names of outputs of the backbone, one or more."""

    def expected(self, value: Any, context: Context) -> str:
        plain = Sequence(Text(empty=False), least=1, unique=True).expected(value, context)
        if plain:
            return plain
        known = context.levels
        if known is None or set(value) <= set(known):
            return ""
        return f"some of {known}, the outputs of the backbone '{context.cfg.MODEL.BACKBONE.NAME}'"


@dataclass(frozen=True)
class Unused(Rule):
    """A key that has no effect: only its default is allowed.

    Attributes:
        default: the value at which nothing is ignored.
        reason: why, and what to do instead.
    """

    default: Any
    reason: str

    def expected(self, value: Any, context: Context) -> str:
        return "" if value == self.default else f"{self.default!r}: {self.reason}"


def rule_of(default: Any) -> Rule:
    """The rule of a key about which no more is known than its default: the type, and that numbers are
    finite."""
    if isinstance(default, bool):
        return Flag()
    if isinstance(default, int):
        return Integer()
    if isinstance(default, float):
        return Number()
    if isinstance(default, str):
        return Text()
    if is_list(default):
        return Sequence()
    return Anything()


def kind_of(default: Any) -> str:
    """In words, the type that the values of a key have."""
    return rule_of(default).expected(None, Context(CfgNode())) or type(default).__name__
