"""Operations in ONNX that torch's exporter of traced graphs lacks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.onnx import register_custom_op_symbolic, symbolic_helper, unregister_custom_op_symbolic

#: The first with all operations on float tensors that detectors need.
OPSET = 18


@contextlib.contextmanager
def registered_symbolics() -> Iterator[None]:
    """Inside, they are known."""
    for name, symbolic in _SYMBOLICS.items():
        register_custom_op_symbolic(name, symbolic, OPSET)
    try:
        yield
    finally:
        for name in _SYMBOLICS:
            unregister_custom_op_symbolic(name, OPSET)


def _sort(graph: Any, tensor: Any, *arguments: Any) -> Any:
    """Stable or not: ONNX's TopK is stable. The last two arguments are the dimension and whether it falls."""
    dim, descending = (symbolic_helper._get_const(value, "i", "sort") for value in arguments[-2:])
    return symbolic_helper._sort_helper(graph, tensor, dim, descending)


def _logaddexp(graph: Any, one: Any, other: Any) -> Any:
    """max(x, y) + log(1 + exp(-abs(x - y)))."""
    distance = graph.op("Abs", graph.op("Sub", one, other))
    term = graph.op("Exp", graph.op("Neg", distance))
    term = graph.op("Add", graph.op("Constant", value_t=torch.ones(())), term)
    return graph.op("Add", graph.op("Max", one, other), graph.op("Log", term))


_SYMBOLICS: dict[str, Callable[..., Any]] = {"aten::sort": _sort, "aten::logaddexp": _logaddexp}
