"""Law 10: a setting that is not allowed fails when the loss is built, and the message names its key; of every
setting of every registered loss, by the rule that its settings state."""

import math
from dataclasses import fields

import pytest

from distill_d2 import DISTILL_LOSS_REGISTRY
from distill_d2.losses.settings import keys_of

LOSSES = dict(DISTILL_LOSS_REGISTRY)


def wrong_values(rule, default):
    """Values of a setting that its rule, or the type of its default, excludes."""
    if rule.choices is not None:
        return ["no such choice"]
    if type(default) not in (int, float):
        return {bool: ["yes", 1], str: [3], tuple: ["a word", [None]]}.get(type(default), [])
    values = [math.nan, math.inf, "a word", True] + [1.5] * (type(default) is int)
    if rule.at_least is not None:
        values.append(rule.at_least - 1)
    if rule.above is not None:
        values += [rule.above, rule.above - 1]
    if rule.at_most is not None:
        values.append(rule.at_most + 1)
    if rule.below is not None:
        values += [rule.below, rule.below + 1]
    return values + [2] * rule.odd


def cases():
    for loss, kind in LOSSES.items():
        rules = keys_of(kind.Settings)
        for each in fields(kind.Settings):
            for value in wrong_values(rules[each.name], each.default) if each.name in rules else ():
                yield pytest.param(loss, each.name, value, id=f"{loss}-{each.name}-{value}")


@pytest.mark.parametrize("loss, name, value", list(cases()))
def test_wrong_value(loss, name, value):
    kind = LOSSES[loss]
    with pytest.raises(ValueError) as caught:
        kind(**{name: value})
    key = kind.config_key(name)
    assert str(caught.value).startswith(f"{key} is {value!r}; expected ")


@pytest.mark.parametrize("loss", LOSSES)
def test_unknown_setting(loss):
    with pytest.raises(TypeError, match=f"{loss} has no settings \\['wait'\\]; it has \\["):
        LOSSES[loss](wait=1.0)


@pytest.mark.parametrize(
    "loss", [n for n, kind in LOSSES.items() if "stop_iter" in keys_of(kind.Settings)]
)
def test_a_loss_that_stops_before_it_starts(loss):
    key = LOSSES[loss].config_key("stop_iter")
    with pytest.raises(ValueError, match=f"{key} is 2; expected -1 or above START_ITER, which is 3"):
        LOSSES[loss](start_iter=3, stop_iter=2)
