"""Read yaml of unknown origin: no code runs, and what is broken or too large is refused with its line."""

from __future__ import annotations

import codecs
import os
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import yaml

from .arithmetic import calculate

MOST_CHARACTERS = 1_000_000
_DEEPEST = 50
# A number of more characters is none that a config needs; Python needs quadratic time to read it.
_LONGEST_NUMBER = 100
_PYTHON = "tag:yaml.org,2002:python/"
# Dates stay text, as detectron2's configs have no other use for them.
_DATE = "tag:yaml.org,2002:timestamp"


def read_yaml_file(path: str) -> Any:
    """The content of a yaml file in UTF-8, with or without a byte order mark.

    Raises:
        FileNotFoundError, OSError: there is no such file, or it cannot be read.
        ValueError: see ``read_yaml``; the message names the file and the line.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"config file '{path}' does not exist")
    if not os.path.isfile(path):
        raise OSError(
            f"config file '{path}' is {'a folder' if os.path.isdir(path) else 'no regular file'}"
        )
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_CHARACTERS + 1)
    except OSError as error:
        raise OSError(f"config file '{path}' cannot be read: {error}") from error
    if len(content) > MOST_CHARACTERS:
        raise ValueError(
            f"config file '{path}' has {os.path.getsize(path)} bytes; expected at most {MOST_CHARACTERS}"
        )
    return read_yaml(_decoded(content, path), f"config file '{path}'")


def read_yaml(text: str, source: str) -> Any:
    """The values of a yaml text: plain ones, ``!!python/tuple``, and arithmetic (``calculate``).

    Args:
        source: what the text is, for messages.

    Raises:
        ValueError: it is not yaml, has another tag, a key twice, or expands to too much (aliases).
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{source} has {len(text)} characters; expected at most {MOST_CHARACTERS}")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        return loader.construct_document(node)
    except _Refused as refused:
        raise ValueError(f"{source}, line {refused.line}: {refused}") from refused
    except yaml.YAMLError as error:
        raise ValueError(f"{source}{_place(error)}: not valid yaml: {_reason(error)}") from error
    except (KeyError, TypeError, ValueError) as error:  # such as "!!bool x"
        raise ValueError(f"{source}: not valid yaml: a value does not fit its tag: {error}") from error


class _Refused(Exception):
    def __init__(self, reason: str, where: yaml.Node | yaml.Event):
        super().__init__(reason)
        self.line = where.start_mark.line + 1 if where.start_mark else 0


class _Loader(yaml.SafeLoader):
    # Without this, a date such as OUTPUT_DIR: 2024-05-01 would not be text.
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _DATE]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.depth > _DEEPEST:
            raise _Refused(f"nested in more than {_DEEPEST} levels", self.peek_event())
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        if len(node.value) > _LONGEST_NUMBER:
            raise _Refused(f"a number of {len(node.value)} characters", node)
        try:
            is_integer = node.tag.endswith(":int")
            return self.construct_yaml_int(node) if is_integer else self.construct_yaml_float(node)
        except (ValueError, OverflowError) as error:
            raise _Refused(f"'{node.value}' is not a number", node) from error

    def construct_expression(self, node: yaml.Node) -> Any:
        values = self.construct_sequence(node, deep=True) if isinstance(node, yaml.SequenceNode) else []
        if len(values) != 1 or not isinstance(values[0], str):
            raise _Refused(
                '!!python/object/apply:eval needs one text in a list, such as ["2 * 3"]', node
            )
        try:
            return calculate(values[0])
        except ValueError as error:
            raise _Refused(str(error), node) from error

    def construct_tuple(self, node: yaml.Node) -> tuple[Any, ...]:
        if not isinstance(node, yaml.SequenceNode):
            raise _Refused("!!python/tuple needs a list", node)
        return tuple(self.construct_sequence(node, deep=True))

    def construct_unknown(self, node: yaml.Node) -> Any:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise _Refused(
            f"the yaml tag {tag} is not read, because tags can run code; write the literal value "
            "(!!python/tuple and arithmetic in !!python/object/apply:eval are read)",
            node,
        )


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)
_Loader.add_constructor(f"{_PYTHON}object/apply:eval", _Loader.construct_expression)
_Loader.add_constructor(f"{_PYTHON}tuple", _Loader.construct_tuple)
for _kind in ("timestamp", "binary", "set", "omap", "pairs"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_unknown)
_Loader.add_constructor(None, _Loader.construct_unknown)


class _Size(NamedTuple):
    """Of a node with all that its aliases stand for."""

    characters: int
    depth: int


def _check_size(root: yaml.Node) -> None:
    sizes: dict[yaml.Node, _Size | None] = {}

    def size(node: yaml.Node) -> _Size:
        known = sizes.get(node)
        if known:
            return known
        if node in sizes:
            raise _Refused("an alias (*name) that contains itself", node)
        sizes[node] = None
        children = [size(child) for child in _children(node)]
        characters = len(node.value) if isinstance(node, yaml.ScalarNode) else 0
        sizes[node] = found = _Size(
            1 + characters + sum(child.characters for child in children),
            1 + max((child.depth for child in children), default=0),
        )
        if found.characters > MOST_CHARACTERS:
            raise _Refused(f"the aliases (*name) expand to more than {MOST_CHARACTERS} characters", node)
        if found.depth > _DEEPEST:
            raise _Refused(f"the aliases (*name) nest in more than {_DEEPEST} levels", node)
        return found

    size(root)


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _check_keys(node: yaml.MappingNode) -> None:
    first: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _Refused("a list or a dict as a key; expected a name", key)
        if key.value in first and key.tag != "tag:yaml.org,2002:merge":
            raise _Refused(
                f"the key {key.value} stands here and in line {first[key.value]}; remove one", key
            )
        first.setdefault(key.value, key.start_mark.line + 1)


def _decoded(content: bytes, path: str) -> str:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"config file '{path}' is encoded in UTF-16; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"config file '{path}', line {line}: not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error
    if "\0" in text:
        raise ValueError(
            f"config file '{path}' holds zero bytes: it is binary, or UTF-16; save it as UTF-8 text"
        )
    return text


def _place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    return f", line {mark.line + 1}" if mark else ""


def _reason(error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    if "'\\t'" in problem:
        return f"{problem}; indent with spaces, not with tabs"
    if "but found another document" in problem:
        return "a second document (---); expected one"
    return problem
