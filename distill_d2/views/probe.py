"""Run a detector's backbone once, to learn the shapes of its levels and what they depend on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ..taps import map_tensors
from .base import DetectorView


def level_shapes(view: DetectorView, height: int, width: int) -> dict[str, tuple[int, ...]]:
    """The shape (C, H, W) of every level, by name, for an image of ``height`` x ``width`` pixels."""
    with _evaluating(view.model.backbone), view.recording():
        view.model.backbone(_black_image(view, height, width))
        stages = [name for name in view.stage_shapes if view.taps.has(view.stage_path(name))]
        return {name: tuple(view.level(name).shape[1:]) for name in [*view.neck_shapes, *stages]}


def reached_parameters(view: DetectorView) -> set[nn.Parameter]:
    """Parameters of the backbone on which the levels and taps that losses read depend."""
    backbone = view.model.backbone
    parameters = [p for p in backbone.parameters() if p.requires_grad]
    sums: list[torch.Tensor] = []
    with _evaluating(backbone), torch.enable_grad(), view.recording():
        with view.until_read():
            backbone(_black_image(view, *view.probe_size))
        map_tensors(lambda tensor: sums.append(tensor.sum()), view.outputs_read())
    trained = [value for value in sums if value.requires_grad]
    if not trained:
        return set()
    gradients = torch.autograd.grad(trained, parameters, allow_unused=True)
    return {p for p, gradient in zip(parameters, gradients) if gradient is not None}


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """All of ``model`` in eval mode and without gradients; afterwards each module's mode is back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _black_image(view: DetectorView, height: int, width: int) -> torch.Tensor:
    mean = getattr(view.model, "pixel_mean", None)
    channels = 3 if mean is None else mean.numel()
    device = next(view.model.parameters()).device
    return torch.zeros(1, channels, height, width, device=device)
