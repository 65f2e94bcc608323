"""The input of an exported detector: how an image becomes it, in words for the file and for the check itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T

from ..inference import Trained
from .graph import INPUT

Size = tuple[int, int]


def fixed_size(trained: Trained) -> Size | None:
    """(height, width) of all images of a run, INPUT.FIXED_SIZE; None: they differ."""
    size = trained.cfg.INPUT.FIXED_SIZE if isinstance(trained.cfg, CfgNode) else ()
    return tuple(size) or None


def prepare(trained: Trained, image: np.ndarray, size: Size | None) -> torch.Tensor:
    """The input (3, H, W), float32, for an image (H', W', 3), uint8, BGR, on the model's device.

    Args:
        size: (height, width); the image is resized to fit into it, and the rest, below and at the right, has the
            mean color. None, or that of ``fixed_size``: it is resized as in the evaluation.
    """
    device = next(trained.model.parameters()).device
    if size is None or size == fixed_size(trained):
        return trained.inputs(image)["image"].float().to(device)
    height, width = image.shape[:2]
    scale = min(size[0] / height, size[1] / width)
    inner = [max(1, min(round(side * scale), most)) for side, most in zip((height, width), size)]
    resized = T.ResizeTransform(height, width, *inner).apply_image(image)
    if channels_of(trained) == "RGB":
        resized = resized[..., ::-1]
    tensor = _mean_color(trained).view(3, 1, 1).repeat(1, *size)
    tensor[:, : inner[0], : inner[1]] = torch.from_numpy(resized.transpose(2, 0, 1).copy())
    return tensor.to(device)


def describe_input(trained: Trained, size: Size | None) -> dict[str, Any]:
    """The input in words, for a json."""
    return {
        "name": INPUT,
        "shape": [3, *(size or ("height", "width"))],
        "dtype": "float32",
        "range": [0, 255],
        "channels": channels_of(trained),
        "normalization": "mean and standard deviation are part of the file",
        "resize": _resize(trained, size),
    }


def channels_of(trained: Trained) -> str:
    """BGR or RGB.

    Raises:
        ValueError: the images of the run have other channels.
    """
    if isinstance(trained.cfg, CfgNode):
        channels = trained.cfg.INPUT.FORMAT
    else:
        channels = getattr(trained.mapper, "image_format", "BGR")
    if channels not in ("BGR", "RGB"):
        raise ValueError(f"INPUT.FORMAT is '{channels}'; only detectors on BGR and RGB can be exported")
    return channels


def _resize(trained: Trained, size: Size | None) -> dict[str, Any]:
    if size is not None and size != fixed_size(trained):
        color = _mean_color(trained).tolist()
        return {"rule": "fit", "height": size[0], "width": size[1], "fill below and right": color}
    if size is not None:
        return {"rule": "stretch", "height": size[0], "width": size[1]}
    mapper = trained.mapper
    steps = mapper.augmentations.augs if type(mapper) is DatasetMapper else ()
    for step in steps:
        if isinstance(step, T.ResizeShortestEdge):
            lengths = {"shortest": step.short_edge_length[0], "longest": step.max_size}
            return {"rule": "shortest edge", **{name: int(side) for name, side in lengths.items()}}
    return {"rule": "as in the evaluation", "by": [str(step) for step in steps] or str(mapper)}


def _mean_color(trained: Trained) -> torch.Tensor:
    """What is 0 after normalization, as detectron2's own padding is."""
    return trained.model.get_buffer("pixel_mean").detach().flatten().float().cpu()
