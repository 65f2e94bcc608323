"""The arithmetic that detectron2's yaml files write as Python expressions, read without running code.

SIZES: !!python/object/apply:eval ["[[x, x * 2**(1.0/3), x * 2**(2.0/3)] for x in [32, 64, 128]]"]
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, Callable

from .messages import shortened

MOST_CHARACTERS = 2000
_MOST_ELEMENTS = 10_000
_DEEPEST = 40
_LARGEST_EXPONENT = 100
_MOST_BITS = 1024

ALLOWED = (
    "numbers, lists, tuples, + - * / **, int(number), and list comprehensions over lists, tuples and "
    "range(...), without conditions"
)

_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def calculate(text: str) -> Any:
    """The value that Python's ``eval`` gives for an expression of the forms in ``ALLOWED``.

    Raises:
        ValueError: another expression; one that is too long, too deep, or whose value is too large.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"an expression of {len(text)} characters; expected at most {MOST_CHARACTERS}")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"'{shortened(text)}' is not an expression: {getattr(error, 'msg', error)}"
        ) from error
    try:
        return _Calculation(text).value(tree.body, {}, 0)
    except (ArithmeticError, TypeError) as error:
        raise ValueError(f"'{shortened(text)}' has no value: {error}") from error


class _Calculation:
    """One evaluation; it counts its steps and the elements of its lists."""

    def __init__(self, text: str):
        self.text = text
        self.steps = 0

    def value(self, node: ast.expr, names: dict[str, Any], depth: int) -> Any:
        self._count(1)
        if depth > _DEEPEST:
            raise ValueError(
                f"'{shortened(self.text)}' is nested too deeply; expected at most {_DEEPEST} levels"
            )
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return self._bounded(node.value)
        if isinstance(node, ast.Name) and node.id in names:
            self._count(_elements(names[node.id]))
            return names[node.id]
        if isinstance(node, (ast.List, ast.Tuple)) and not any(
            isinstance(e, ast.Starred) for e in node.elts
        ):
            values = [self.value(element, names, depth + 1) for element in node.elts]
            return values if isinstance(node, ast.List) else tuple(values)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -self.value(node.operand, names, depth + 1)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return self._operation(node, names, depth + 1)
        if isinstance(node, ast.ListComp):
            return [
                self.value(node.elt, inner, depth + 1)
                for inner in self._loops(node.generators, names, depth)
            ]
        if isinstance(node, ast.Call) and _is_call_of(node, "int") and len(node.args) == 1:
            return int(self._number(node.args[0], names, depth + 1))
        raise self._refused(node)

    def _operation(self, node: ast.BinOp, names: dict[str, Any], depth: int) -> Any:
        left, right = self.value(node.left, names, depth), self.value(node.right, names, depth)
        numbers = _is_number(left) and _is_number(right)
        if isinstance(node.op, ast.Pow) and numbers and abs(right) > _LARGEST_EXPONENT:
            raise ValueError(f"the exponent {right:g}; expected at most {_LARGEST_EXPONENT}")
        if isinstance(node.op, ast.Mult) and not numbers:
            times = [value for value in (left, right) if type(value) is int]
            self._count(_elements([left, right]) * max([1, *times]))
        value = _OPERATORS[type(node.op)](left, right)
        if _is_number(value):
            return self._bounded(value)
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"'{shortened(self.text)}' has a complex number")
        self._count(_elements(value))
        return value

    def _loops(
        self, generators: Sequence[ast.comprehension], names: dict[str, Any], depth: int
    ) -> Iterator[dict[str, Any]]:
        """The names with their values in each round of nested loops."""
        if not generators:
            yield names
            return
        loop = generators[0]
        if loop.ifs or loop.is_async:
            raise self._refused(loop.ifs[0] if loop.ifs else loop.iter)
        for value in self._items(loop.iter, names, depth + 1):
            self._count(1)
            yield from self._loops(
                generators[1:], {**names, **self._assigned(loop.target, value)}, depth
            )

    def _items(self, node: ast.expr, names: dict[str, Any], depth: int) -> Sequence[Any]:
        if isinstance(node, ast.Call) and _is_call_of(node, "range") and 1 <= len(node.args) <= 3:
            return range(*(self._number(argument, names, depth) for argument in node.args))
        values = self.value(node, names, depth)
        if not isinstance(values, (list, tuple)):
            raise self._refused(node)
        return values

    def _assigned(self, target: ast.expr, value: Any) -> dict[str, Any]:
        if isinstance(target, ast.Name):
            return {target.id: value}
        if (
            isinstance(target, ast.Tuple)
            and isinstance(value, (list, tuple))
            and len(target.elts) == len(value)
            and all(isinstance(element, ast.Name) for element in target.elts)
        ):
            return {
                element.id: item
                for element, item in zip(target.elts, value)
                if isinstance(element, ast.Name)
            }
        raise self._refused(target)

    def _number(self, node: ast.expr, names: dict[str, Any], depth: int) -> Any:
        value = self.value(node, names, depth)
        if not _is_number(value):
            raise self._refused(node)
        return value

    def _bounded(self, value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"'{shortened(self.text)}' has a number that is not finite")
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise ValueError(f"'{shortened(self.text)}' has an integer of more than {_MOST_BITS} bits")
        return value

    def _count(self, steps: int) -> None:
        self.steps += steps
        if self.steps > _MOST_ELEMENTS:
            raise ValueError(f"'{shortened(self.text)}' has more than {_MOST_ELEMENTS} elements")

    def _refused(self, node: ast.expr) -> ValueError:
        part = ast.get_source_segment(self.text.strip(), node) or type(node).__name__
        return ValueError(f"'{shortened(part)}' is not read; arithmetic may have {ALLOWED}")


def _is_call_of(node: ast.Call, name: str) -> bool:
    plain = not node.keywords and not any(isinstance(argument, ast.Starred) for argument in node.args)
    return plain and isinstance(node.func, ast.Name) and node.func.id == name


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _elements(value: Any) -> int:
    """The numbers and lists in a value, as often as they would be printed."""
    return 1 + sum(map(_elements, value)) if isinstance(value, (list, tuple)) else 1
