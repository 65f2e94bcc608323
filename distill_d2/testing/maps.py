"""Views of detectors whose levels are given tensors: losses on literal numbers."""

from __future__ import annotations

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import nn

from distill_d2.views import DetectorView


class _Maps(Backbone):
    def __init__(self, maps: dict[str, torch.Tensor], strides: dict[str, int]):
        super().__init__()
        self.maps, self.strides = maps, strides

    def forward(self, _image):
        return self.maps

    def output_shape(self):
        return {
            name: ShapeSpec(channels=feature.shape[1], stride=self.strides[name])
            for name, feature in self.maps.items()
        }


class MapDetector(nn.Module):
    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone


def view_of(
    maps: dict[str, torch.Tensor], role: str, strides: dict[str, int] | None = None
) -> DetectorView:
    """A view, recording, of a detector that computed these (N, C, H, W); "p3" has stride 8."""
    strides = strides or {name: 2 ** int(name[1:]) for name in maps}
    view = DetectorView(MapDetector(_Maps(maps, strides)), role)
    view.taps.start()
    view.model.backbone(None)
    return view


def compare(loss, student: dict[str, torch.Tensor], teacher: dict[str, torch.Tensor]):
    """The terms of a loss, bound to and run on detectors with these maps."""
    student, teacher = view_of(student, "student"), view_of(teacher, "teacher")
    loss.bind(student, teacher)
    return loss(student, teacher, None)


def plane(*rows) -> torch.Tensor:
    """One channel of one image: (1, 1, H, W)."""
    return torch.tensor(rows, dtype=torch.float32)[None, None]
