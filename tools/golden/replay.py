"""Detectors that return a fixture's feature maps, so that losses see them through real views."""

from __future__ import annotations

import contextlib
from typing import Dict, Iterator

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import nn

from distill_d2 import DetectorView, DistillLoss
from distill_d2.views import Batch, build_view

from . import Fixture

Maps = Dict[str, torch.Tensor]


class _Replay(Backbone):
    def __init__(self, maps: Maps, strides: Dict[str, int]):
        super().__init__()
        self.maps = maps
        self.strides = strides

    def forward(self, _images: torch.Tensor) -> Maps:
        return self.maps

    def output_shape(self) -> Dict[str, ShapeSpec]:
        return {
            name: ShapeSpec(channels=level.shape[1], stride=self.strides[name])
            for name, level in self.maps.items()
        }


class _Detector(nn.Module):
    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone


@contextlib.contextmanager
def replayed(maps: Maps, strides: Dict[str, int], role: str) -> Iterator[DetectorView]:
    """The view of a detector whose neck has just returned ``maps``, (N, C, H, W) by level name."""
    view = build_view(_Detector(_Replay(maps, strides)), role)
    with view.recording():
        view.model.backbone(torch.empty(0))
        yield view


def feature_loss(loss: DistillLoss, student: Maps, teacher: Maps) -> Dict[str, torch.Tensor]:
    """The terms of a loss that reads neck levels only, on given maps."""
    strides = {name: 2**index for index, name in enumerate(student)}  # only compared for equality
    with replayed(student, strides, "student") as ours:
        with replayed(teacher, strides, "teacher") as theirs:
            loss.bind(ours, theirs)
            return loss(ours, theirs, Batch([], (0, 0), iteration=0, max_iter=1))


def read_maps(fixture: Fixture, folder: str, requires_grad: bool = False) -> Maps:
    """The arrays "folder/level" by level name."""
    names = fixture.names(f"{folder}/*")
    return {
        name.rpartition("/")[2]: fixture.tensor(name).requires_grad_(requires_grad) for name in names
    }
