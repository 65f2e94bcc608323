"""Detectors in onnxruntime, measured in turn."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, Callable

import torch
from torch import nn

from ..export.exporting import export_graph
from ..export.formats import require
from ..export.graph import INPUT, graph_of
from ..quiet import quiet
from .timing import time_in_turn


def onnx_milliseconds(
    models: Mapping[str, nn.Module],
    inputs: Mapping[str, Sequence[dict[str, Any]]],
    *,
    seconds: float = 10.0,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """``milliseconds_per_image`` of models on the CPU, exported for images of one size and run by onnxruntime with
    torch's number of threads.

    Args:
        inputs: of each model, all of one size.

    Returns:
        milliseconds, and why other models are not among them, both by name.
    """
    runs: dict[str, Callable[[], None]] = {}
    problems: dict[str, str] = {}
    for name, model in models.items():
        try:
            runs[name] = _exported(model, [item["image"].float() for item in inputs[name]])
        except (ValueError, ImportError) as error:
            problems[name] = str(error)
    times = time_in_turn(runs, seconds=seconds)
    return {name: [1000 * each / len(inputs[name]) for each in times[name]] for name in runs}, problems


def _exported(model: nn.Module, images: Sequence[torch.Tensor]) -> Callable[[], None]:
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # errors are raised, too
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = os.path.join(folder, "model.onnx")
        export_graph(graph_of(model, images[0]), images[0], path, "onnx")
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    arrays = [image.numpy() for image in images]

    def run() -> None:
        for array in arrays:
            session.run(None, {INPUT: array})

    try:
        run()
    except Exception as error:  # of onnxruntime
        raise ValueError(
            f"a {type(model).__name__} fails in onnxruntime: {str(error).splitlines()[0]}"
        ) from error
    return run
