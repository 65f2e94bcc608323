"""Size, work and time of detectors, measured side by side."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from detectron2.utils.analysis import FlopCountAnalysis
from torch import nn

from ..benchmark.meter import Meter
from ..quiet import without_warnings
from ..views import view_type
from .onnx import onnx_milliseconds
from .parts import PARTS, has_bottom_up, parameters, part_of, time_shares
from .timing import milliseconds_per_image

_SEED = 0


@dataclass(frozen=True)
class Profile:
    """What was measured of one detector.

    Attributes:
        size: (height, width) of the images that it was given, in pixels.
        parameters: their number, by part: "backbone", "neck", "head".
        gflops: 10^9 multiply-adds for one image, by part; {}: they cannot be counted.
        megabytes: of its weights as a file, 10^6 bytes.
        milliseconds: per image, a batch of one, of each round; those of all detectors correspond.
        shares: of each part in that time, and of pre- and post-processing.
        peak_megabytes: memory that a prediction takes beside the weights, 2^20 bytes; None: not known.
        onnx_milliseconds: as ``milliseconds``, in onnxruntime; []: not measured.
        onnx_problem: why not; "": it was not asked for.
    """

    size: tuple[int, int]
    parameters: dict[str, int]
    gflops: dict[str, float]
    megabytes: float
    milliseconds: list[float]
    shares: dict[str, float]
    peak_megabytes: float | None = None
    onnx_milliseconds: list[float] = field(default_factory=list)
    onnx_problem: str = ""

    @property
    def milliseconds_per_image(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.milliseconds)


def profile(
    models: Mapping[str, nn.Module],
    size: tuple[int, int],
    images: Sequence[np.ndarray] = (),
    seconds: float = 10.0,
    onnx: bool = False,
) -> dict[str, Profile]:
    """Measure detectors side by side.

    Args:
        models: in eval, by name, on one device.
        size: (height, width) in pixels of the images; a detector of one fixed size gets that.
        images: (H, W, 3), uint8, BGR, resized to that size; none: a generated one, on which little is found.
        seconds: about how long to measure the times.
        onnx: also in onnxruntime, where it is installed and the detector can be exported.
    """
    inputs = {name: inputs_of(model, size, images) for name, model in models.items()}
    times = milliseconds_per_image(models, inputs, seconds=seconds)
    of_onnx, problems = onnx_milliseconds(models, inputs, seconds=seconds) if onnx else ({}, {})
    return {
        name: Profile(
            size=(inputs[name][0]["height"], inputs[name][0]["width"]),
            parameters=parameters(model),
            gflops=gflops(model, inputs[name][0]),
            megabytes=sum(w.numel() * w.element_size() for w in model.state_dict().values()) / 1e6,
            milliseconds=times[name],
            shares=time_shares(model, inputs[name], seconds=seconds / 4),
            peak_megabytes=peak_megabytes(model, inputs[name][0]),
            onnx_milliseconds=of_onnx.get(name, []),
            onnx_problem=problems.get(name, ""),
        )
        for name, model in models.items()
    }


def inputs_of(
    model: nn.Module, size: tuple[int, int], images: Sequence[np.ndarray] = ()
) -> list[dict[str, Any]]:
    """Inputs of a model: see ``profile``."""
    side = view_type(model)(model, "student").fixed_size
    height, width = (side, side) if side else size
    channels = len(getattr(model, "pixel_mean", "BGR"))
    pictures = [cv2.resize(image, (width, height)).transpose(2, 0, 1) for image in images]
    tensors = [torch.from_numpy(np.ascontiguousarray(picture)) for picture in pictures]
    return [
        {"image": tensor[:channels], "height": height, "width": width}
        for tensor in tensors or [_generated(3, height, width)]
    ]


def peak_megabytes(model: nn.Module, item: dict[str, Any]) -> float | None:
    """Memory that a prediction takes beside the weights, 2^20 bytes; None where the system does not tell."""
    meter = Meter(next(model.parameters()).device)
    if not meter.per_row:
        return None
    with torch.inference_mode():
        return meter.peak_memory(lambda: model([item]))


def gflops(model: nn.Module, item: dict[str, Any]) -> dict[str, float]:
    """10^9 multiply-adds for one image, by part, as fvcore counts them: those of convolutions, matrix products and
    the like; {} where the model cannot be traced."""
    with without_warnings():
        try:
            counts = FlopCountAnalysis(model, [item]).by_module()
        except Exception:  # tracing runs the whole detector, and may raise anything
            return {}
    names = [name for name, _ in model.named_children()]
    if has_bottom_up(model):
        names.append("backbone.bottom_up")
    found = dict.fromkeys(PARTS, 0.0)
    for name in names:
        found[part_of(name, has_bottom_up(model))] += counts[f"model.{name}"] / 1e9
    if has_bottom_up(model):
        found["neck"] -= found["backbone"]
    return found


def _generated(channels: int, height: int, width: int) -> torch.Tensor:
    """A smooth random image."""
    generator = torch.Generator().manual_seed(_SEED)
    coarse = torch.rand(1, channels, height // 16 + 2, width // 16 + 2, generator=generator) * 255
    return F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)[0].to(
        torch.uint8
    )
