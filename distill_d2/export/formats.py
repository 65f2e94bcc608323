"""A graph in each format: written to a file, and read from it again."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ..quiet import without_warnings
from .graph import INPUT, DetectorGraph
from .symbolics import OPSET, registered_symbolics
from .traceable import exportable, traceable

#: From an input (3, H, W) to the outputs.
Run = Callable[[torch.Tensor], Sequence[np.ndarray]]

#: Name of the json inside of TorchScript and torch.export files; ONNX has each of its keys.
EXTRA = "distill_d2.json"


def write_onnx(
    graph: DetectorGraph, example: torch.Tensor, path: str, about: dict[str, Any], dynamic: bool
) -> None:
    """Args:
    example: an input.
    about: of the file's metadata.
    dynamic: whether inputs of other sizes are allowed.
    """
    onnx = require("onnx")
    sizes = {INPUT: {1: "height", 2: "width"}} if dynamic else {}
    counts = {name: {0: "detections"} for name in graph.names}
    options: dict[str, Any] = {"dynamo": False}  # torch.export cannot record a size that is not fixed
    if "dynamo" not in inspect.signature(torch.onnx.export).parameters:
        options = {}
    with without_warnings(), traceable(), registered_symbolics():
        torch.onnx.export(
            graph,
            (example,),
            path,
            input_names=[INPUT],
            output_names=graph.names,
            dynamic_axes={**sizes, **counts},
            opset_version=OPSET,
            **options,
        )
    model = onnx.load(path)
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    onnx.helper.set_model_props(model, texts)
    onnx.save(model, path)


def write_torchscript(
    graph: DetectorGraph, example: torch.Tensor, path: str, about: dict[str, Any], dynamic: bool
) -> None:
    """Args: see ``write_onnx``; any size is allowed."""
    with without_warnings(), traceable():
        traced = torch.jit.trace(graph, (example,), check_trace=False)
        torch.jit.save(traced, path, _extra_files={EXTRA: json.dumps(about)})


def write_torch_export(
    graph: DetectorGraph, example: torch.Tensor, path: str, about: dict[str, Any], dynamic: bool
) -> None:
    """Args: see ``write_onnx``; no other size is allowed."""
    with without_warnings(), exportable():
        program = torch.export.export(graph, (example,), strict=False)
        torch.export.save(program, path, extra_files={EXTRA: json.dumps(about)})


def read_onnx(path: str, device: str = "cpu") -> Run:
    """In onnxruntime, on the CPU."""
    session = require("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: session.run(None, {INPUT: image.cpu().numpy()})


def read_torchscript(path: str, device: str = "cpu") -> Run:
    with without_warnings():
        return _outputs_of(torch.jit.load(path, map_location=device))


def read_torch_export(path: str, device: str = "cpu") -> Run:
    with without_warnings():
        return _outputs_of(torch.export.load(path).module())


def require(package: str) -> Any:
    """Import a package of the extra "onnx".

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    import importlib

    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the format onnx needs the package {package}; `pip install 'distill_d2[onnx]'` installs it"
        ) from error


def _outputs_of(module: Callable[[torch.Tensor], Sequence[torch.Tensor]]) -> Run:
    @torch.no_grad()
    def run(image: torch.Tensor) -> list[np.ndarray]:
        return [output.cpu().numpy() for output in module(image)]

    return run
