"""Write a trained detector in a format, check it against the model, and describe it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import detectron2
import numpy as np
import torch

from .. import __version__
from ..checkpoint import PARTIAL, write_whole
from ..data.shapes import draw_image
from ..inference import Trained
from ..inference.images import read_bgr
from ..inference.truth import truth_of_tests
from ..messages import shortened
from . import formats
from .check import LIMITS, LOST, Differences, compare
from .graph import MEANINGS, DetectorGraph, graph_of
from .inputs import Size, describe_input, fixed_size, prepare

_IMAGES = 8
_GENERATED = 256  # pixels


@dataclass(frozen=True)
class Format:
    """A format of graphs: its file's ending, and how it is written and read (see ``formats``)."""

    suffix: str
    write: Callable[..., None]
    read: Callable[[str, str], formats.Run]


#: Of graphs, by the names on the command line.
FORMATS = {
    "onnx": Format(".onnx", formats.write_onnx, formats.read_onnx),
    "torchscript": Format(".pt", formats.write_torchscript, formats.read_torchscript),
    "torch-export": Format(".pt2", formats.write_torch_export, formats.read_torch_export),
}


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        path: of the file; description: of the json beside it.
        size: (height, width) of the input; None: any.
        names: of the outputs.
        run: from an input (3, H, W), float32, to the outputs, read from the file.
        differences: from the model.
    """

    path: str
    description: str
    size: Size | None
    names: list[str]
    run: formats.Run
    differences: Differences


def check_images(trained: Trained, paths: Sequence[str] = ()) -> tuple[list[np.ndarray], str]:
    """Images (H, W, 3), uint8, BGR, to compare a file with the model on, and what they are.

    Args:
        paths: of images; without any some of the run's test data, or where these are not here generated ones.

    Raises:
        UnreadableRecord: an image cannot be read.
    """
    if paths:
        return [read_bgr(path) for path in paths], "images of --images"
    truth = truth_of_tests(trained)
    found = [path for path in truth.paths if os.path.isfile(path)] if truth else []
    if found:
        return [read_bgr(path) for path in found[:_IMAGES]], "images of the run's test data"
    random = np.random.RandomState(0)
    generated = [draw_image(random, _GENERATED)[0] for _ in range(_IMAGES)]
    return generated, "generated images; --images takes yours"


def export(
    trained: Trained,
    path: str,
    format: str,
    images: Sequence[np.ndarray],
    *,
    size: Size | None = None,
    threshold: float = 0.0,
) -> Exported:
    """Write a graph and check it. Beside it, a json describes input, outputs and classes, as the file's own
    metadata do.

    Args:
        path: of the file; it is replaced.
        format: of FORMATS.
        images: (H, W, 3), uint8, BGR, to compare the file with the model on.
        size: (height, width) of the input; None: that of all the run's images where they have one
            (INPUT.FIXED_SIZE), else any; for torch-export that of the first image as the evaluation resizes it.
        threshold: lower scores are left out, beyond the detector's own threshold.

    Raises:
        ValueError: the detector cannot be exported in this format, or what was exported differs from the model;
            then there is no file.
        ImportError: the format needs a package that is not installed.
        OSError: the file cannot be written.
    """
    size = size or fixed_size(trained)
    inputs = [prepare(trained, image, size) for image in images]
    if format == "torch-export" and size is None:
        size = (inputs[0].shape[1], inputs[0].shape[2])
        inputs = [prepare(trained, image, size) for image in images]
    example = _with_most(trained, inputs)
    if size is None:  # one is of another size in any case
        inputs.append(example[:, : example.shape[1] * 3 // 4].contiguous())
    graph = graph_of(trained.model, example, threshold)
    about = describe(trained, graph, size, format)
    partial = path + PARTIAL
    try:
        run = export_graph(graph, example, partial, format, about, size is None)
        differences = compare(graph.names, graph, run, inputs)
        if not differences.within_limits:
            raise ValueError(
                f"the {format} file finds other objects than the model: {differences}. Detections count as found "
                f"again within {LIMITS}, and {LOST:.0%} may be lost; nothing was written"
                f"{'; with --size HxW the file is for one size' if size is None else ''}"
            )
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)
    description = f"{path}.json"
    text = json.dumps({**about, "checked": str(differences)}, indent=1, ensure_ascii=False)
    write_whole(description, lambda file: file.write(f"{text}\n".encode()))
    return Exported(path, description, size, graph.names, run, differences)


def export_graph(
    graph: DetectorGraph,
    example: torch.Tensor,
    path: str,
    format: str,
    about: dict[str, Any] | None = None,
    dynamic: bool = False,
) -> formats.Run:
    """Write a graph (see ``graph_of``) without any check, and read it again.

    Args:
        example: an input (3, H, W).
        about: of the file's metadata.
        dynamic: whether onnx takes inputs of other sizes.

    Raises:
        ValueError, ImportError, OSError: see ``export``.
    """
    kind = FORMATS[format]
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        kind.write(graph, example, path, about or {}, dynamic)
        return kind.read(path, str(example.device))
    except (OSError, ImportError):
        raise
    except Exception as error:  # of torch, onnx and onnxruntime
        others = [name for name in FORMATS if name != format]
        raise ValueError(
            f"a {type(graph.model).__name__} cannot be exported as {format}: {_first_line(error)}. Try "
            f"--format {' or '.join(others)}; --format weights exports any detector"
        ) from error


def describe(trained: Trained, graph: DetectorGraph, size: Size | None, format: str) -> dict[str, Any]:
    """What a user of the file needs to know, for a json."""
    return {
        "detector": type(trained.model).__name__,
        "format": format,
        "classes": trained.classes,
        "input": describe_input(trained, size),
        "outputs": {name: MEANINGS[name] for name in graph.names},
        "score_threshold": graph.threshold or "the detector's own",
        "made_by": f"distill_d2 {__version__}, torch {torch.__version__}, detectron2 {detectron2.__version__}",
    }


@torch.no_grad()
def _with_most(trained: Trained, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The input with most detections: what is not computed is not recorded."""
    counts = [len(trained.model([{"image": image}])[0].get("instances", ())) for image in inputs]
    return inputs[counts.index(max(counts))]


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return shortened(lines[0] if lines else type(error).__name__, 300)
