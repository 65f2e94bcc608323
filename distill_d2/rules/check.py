"""Check a config against tables of rules."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from .context import Context
from .kinds import Levels, Rule


class RuleError(ValueError):
    """Values of a config are not allowed; the message names each key, its value and what was expected."""


def check_rules(
    context: Context,
    rules: Mapping[str, Rule],
    relations: Callable[[Context], Iterable[str]] = lambda context: (),
    source: str = "",
) -> None:
    """Check values of a config.

    Args:
        rules: by full names of keys; those that the config does not have are left out.
        relations: problems between keys, whole messages, looked for where each value alone is right.
        source: which config it is, for the message.

    Raises:
        RuleError: a value is not allowed.
    """
    of_levels = {key: rule for key, rule in rules.items() if isinstance(rule, Levels)}
    others = {key: rule for key, rule in rules.items() if key not in of_levels}
    # A backbone, whose levels are asked for, can be built only from right values.
    steps: tuple[Callable[[], Iterable[str]], ...] = (
        lambda: faults(context, others),
        lambda: faults(context, of_levels),
        lambda: relations(context),
    )
    for step in steps:
        problems = list(step())
        if problems:
            raise RuleError(_message(problems, source))


def _message(problems: list[str], source: str) -> str:
    start = f"{source}: " if source else ""
    if len(problems) == 1:
        return start + problems[0]
    return f"{start}{len(problems)} values cannot be used:\n" + "\n".join(problems)


def faults(context: Context, rules: Mapping[str, Rule]) -> Iterator[str]:
    """A message for each value that is not allowed."""
    for key, rule in rules.items():
        try:
            value = context.value(key)
        except KeyError:
            continue
        expected = rule.expected(value, context)
        if expected:
            yield f"{key} is {shown(value)}; expected {expected}"


def shown(value: Any) -> str:
    """A value for a message, not too long."""
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


_MISMATCH = re.compile(
    r"Type mismatch \(<class '(.+?)'> vs\. <class '(.+?)'>\) with values \((.*) vs\. (.*)\) for config key: (.+)",
    re.DOTALL,
)
_NAMES = {"str": "a text", "int": "an integer", "float": "a number", "bool": "True or False"}


def type_message(error: ValueError) -> str:
    """The message of an error of yacs about a value of another type, in the form of a rule's; other errors keep
    theirs."""
    found = _MISMATCH.match(str(error))
    if not found:
        return str(error)
    wanted, got, default, value, key = found.groups()
    if wanted in ("list", "tuple"):
        brackets = "[...]" if wanted == "list" else "(..., ) or [...]"
        words = f"a list, {brackets}"
    elif "CfgNode" in wanted:
        words = "a node of keys, {name: value, ...}"
    else:
        words = _NAMES.get(wanted, wanted)
    value, got = ("a node", "a node") if "CfgNode" in got else (shown_text(value, got), got)
    hint = ", with a decimal point" if (wanted, got) == ("float", "int") else ""
    example = "" if "CfgNode" in wanted or len(default) > 60 else f", as its default {default}"
    return f"{key} is {value} ({got}); expected {words}{hint}{example}"


def shown_text(text: str, kind: str) -> str:
    """yacs's text of a value, with quotes around a string, not too long."""
    text = text if len(text) <= 200 else text[:200] + "..."
    return f"'{text}'" if kind == "str" else text
