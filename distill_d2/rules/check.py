"""Check a config against tables of rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

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
    problems = (
        list(faults(context, others)) or list(faults(context, of_levels)) or list(relations(context))
    )
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
        if context.has_key(key) and (expected := rule.expected(context.value(key), context)):
            yield context.wrong(key, expected)
