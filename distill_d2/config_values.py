"""Set the values of a config: of yaml files, and of the command line's KEY VALUE pairs."""

from __future__ import annotations

import ast
import copy
import difflib
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Callable

from detectron2.config import CfgNode, get_cfg

from .messages import shortened
from .pairs import pairs_of
from .rules import kind_of
from .safe_yaml import read_yaml

MOST_CHARACTERS = 50_000
_LONGEST_TEXT = 5_000
_LARGEST_INTEGER = 2**63


def set_values(
    cfg: CfgNode, values: Mapping[str, Any], source: Callable[[str], str] = lambda key: ""
) -> None:
    """Set keys of a config, in place, to values that yaml has for them. All that are wrong are told.

    As in yacs, a text that is a Python literal stands for its value, and lists and tuples become the type
    that the key has. Unlike there, a key of text keeps a text that looks like a number, and an integer is a
    value of a key that holds a float.

    Args:
        source: the start of messages about a key, given its dotted name.

    Raises:
        KeyError: a key does not exist.
        ValueError: a value of another type.
    """
    errors: list[Exception] = []
    _set(cfg, values, cfg, "", source, errors.append)
    _raise(errors)


def set_options(cfg: CfgNode, words: Sequence[str]) -> None:
    """Set keys of a config, in place, to the values of the command line's KEY VALUE or KEY=VALUE: Python
    literals, yaml, or text where a key holds text.

    Raises:
        KeyError: a key does not exist.
        ValueError: a key without a value; a value that is too long, broken, or of another type.
    """
    pairs = pairs_of(words)
    known = set(config_keys(cfg))
    _raise([_unknown_key(cfg, key, "") for key in dict.fromkeys(pairs[::2]) if key not in known])
    errors: list[Exception] = []
    for key, text in zip(pairs[::2], pairs[1::2]):
        *parents, name = key.split(".")
        node = functools.reduce(getattr, parents, cfg)
        try:
            value = _value_of(text, node[name], key)
        except ValueError as error:
            errors.append(error)
        else:
            _set(node, {name: value}, cfg, key[: -len(name)], lambda key: "", errors.append)
    _raise(errors)


def _raise(errors: Sequence[Exception]) -> None:
    """The only error, or one of the first one's type with all messages."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        messages = "\n".join(str(error.args[0]) for error in errors)
        raise type(errors[0])(f"{len(errors)} keys of the config are wrong:\n{messages}")


def config_keys(node: CfgNode, prefix: str = "") -> list[str]:
    """The dotted names of all keys of a node, each after ``prefix``."""
    keys = []
    for name, value in node.items():
        keys.append(prefix + name)
        if isinstance(value, CfgNode):
            keys += config_keys(value, f"{prefix}{name}.")
    return keys


def _set(
    node: CfgNode,
    values: Mapping[Any, Any],
    cfg: CfgNode,
    prefix: str,
    source_of: Callable[[str], str],
    told: Callable[[Exception], None],
) -> None:
    """Set values of a node, which is below ``prefix`` in the whole config ``cfg``; what is wrong is told."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and isinstance(node.get(name), CfgNode):
            _set(node[name], value, cfg, f"{key}.", source_of, told)
            continue
        try:
            node[name] = _new_value(node, name, value, cfg, key, source_of(key))
        except (KeyError, ValueError) as error:
            told(error)


def _new_value(node: CfgNode, name: Any, value: Any, cfg: CfgNode, key: str, source: str) -> Any:
    """The value of a key of a node, as the config holds it."""
    if not isinstance(name, str):
        raise ValueError(
            f"{source}the key '{key}' is {type(name).__name__} in yaml; expected the name of a key"
        )
    if name not in node and not node.is_new_allowed():
        raise _unknown_key(cfg, key, source)
    current = node.get(name)
    if not isinstance(value, Mapping):
        return _fitted(value, current, key, source)
    if name in node:
        raise _mismatch(value, current, key, source)
    _check_range(value, f"{source}{key}")
    return CfgNode(copy.deepcopy(dict(value)))


def _fitted(value: Any, current: Any, key: str, source: str) -> Any:
    """A value in the type that the key has."""
    if isinstance(current, CfgNode):
        raise _mismatch(value, current, key, source)
    if isinstance(value, str):
        literal = _literal(value, f"{source}{key}")
        is_text = isinstance(current, str) and literal is not None and not isinstance(literal, str)
        value = value if is_text else literal
    _check_range(value, f"{source}{key}")
    if type(value) is type(current) or current is None:
        return copy.deepcopy(value)
    if isinstance(value, (list, tuple)) and isinstance(current, (list, tuple)):
        return type(current)(copy.deepcopy(value))
    if type(value) is int and isinstance(current, float):
        return float(value)
    if value is None and _is_none_by_default(key):
        return None
    raise _mismatch(value, current, key, source)


def _check_range(value: Any, what: str) -> None:
    """Refuse what torch's numbers and the names of files cannot hold."""
    if isinstance(value, (list, tuple, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            _check_range(item, what)
    elif isinstance(value, int) and abs(value) >= _LARGEST_INTEGER:
        raise ValueError(f"{what} has an integer of more than 64 bits")
    elif isinstance(value, str) and "\0" in value:
        raise ValueError(f"{what} has a text with a zero byte")


def _value_of(text: str, current: Any, key: str) -> Any:
    """The value that a text on the command line stands for."""
    if len(text) > MOST_CHARACTERS:
        raise ValueError(
            f"{key} has a value of {len(text)} characters; expected at most {MOST_CHARACTERS}"
        )
    value = _literal(text, key)
    if isinstance(current, str):
        if len(text) > _LONGEST_TEXT:
            raise ValueError(
                f"{key} is a text of {len(text)} characters; expected at most {_LONGEST_TEXT}"
            )
        return text
    try:
        value = read_yaml(text, "yaml") if value == text and current is not None else value
    except ValueError as error:
        raise ValueError(f"{_wrong(repr(text), current, key)}: {error}") from error
    if isinstance(current, CfgNode) and not isinstance(value, Mapping):
        raise _mismatch(text, current, key, "")
    return value


def _literal(text: str, what: str) -> Any:
    """The value of a Python literal; other texts stay."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError):
        return text
    except (MemoryError, RecursionError) as error:
        raise ValueError(
            f"{what} is '{shortened(text)}', a Python literal that is nested too deeply"
        ) from error


def _is_none_by_default(key: str) -> bool:
    try:
        return functools.reduce(getattr, key.split("."), get_cfg()) is None
    except AttributeError:  # no key of detectron2
        return False


def _mismatch(value: Any, current: Any, key: str, source: str) -> ValueError:
    found = "empty (None)" if value is None else f"'{value}'" if isinstance(value, str) else repr(value)
    advice = ""
    if isinstance(current, (list, tuple)) and isinstance(value, (str, int, float)):
        advice = f". Write [{shortened(value)}], on a command line in quotes"
    return ValueError(source + _wrong(found, current, key) + advice)


def _wrong(found: str, current: Any, key: str) -> str:
    is_node = isinstance(current, CfgNode)
    return (
        f"{key} is {shortened(found)}; expected {'{name: value, ...}' if is_node else kind_of(current)}"
    )


def _unknown_key(cfg: CfgNode, key: str, source: str) -> KeyError:
    names = config_keys(cfg)
    if key in names:  # a dotted name in a yaml file
        node, _, name = key.rpartition(".")
        return KeyError(f"{source}unknown config key '{key}'; in yaml write {node}: {{{name}: ...}}")
    close = [name for name in names if name.upper() == key.upper()]
    close = close or difflib.get_close_matches(key, names, n=3)
    advice = f"; the closest are {close}" if close else ""
    return KeyError(f"{source}unknown config key '{shortened(key)}'{advice}")
