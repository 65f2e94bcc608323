"""Where on each level two detectors' features differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distill_d2.views import Batch

from . import ColorScale, Picture, Row


def standardize(feature: torch.Tensor, dims: Sequence[int], unbiased: bool) -> torch.Tensor:
    """A map (N, C, H, W) with mean 0 and deviation 1 over ``dims``."""
    deviation, mean = torch.std_mean(feature, list(dims), unbiased=unbiased, keepdim=True)
    return (feature - mean) / (deviation + 1e-6)


def error_row(errors: dict[str, torch.Tensor], batch: Batch, picture: Picture, label: str) -> Row:
    """Ground truth beside the errors of each level, on one color scale.

    Args:
        errors: (1, C, h, w) by level; their mean over channels is shown.
        label: of the color scale.
    """
    padded = batch.padded_size
    maps = {name: error[0].mean(dim=0) for name, error in errors.items()}
    top = max(float(picture.visible(values, padded).max()) for values in maps.values())
    scale = ColorScale(label, top or 1.0)
    panels = [picture.ground_truth()]
    for name, values in maps.items():
        mean = float(picture.visible(values, padded).mean())
        panels.append(picture.heat(f"{name}: mean {mean:.3g}", values, padded))
    return Row(panels, scale)
