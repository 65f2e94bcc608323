"""Detectors that return a fixture's feature maps, so that losses see them through real views."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import nn

from distill_d2 import DetectorView, DistillLoss
from distill_d2.views import Batch, Predictions, build_view, register_view

from . import Fixture

Maps = dict[str, torch.Tensor]


class _Replay(Backbone):
    def __init__(self, maps: Maps, strides: dict[str, int]):
        super().__init__()
        self.maps = maps
        self.strides = strides

    def forward(self, _images: torch.Tensor) -> Maps:
        return self.maps

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            name: ShapeSpec(channels=level.shape[1], stride=self.strides[name])
            for name, level in self.maps.items()
        }


class _Detector(nn.Module):
    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone


class _DetectorWithHead(_Detector):
    predictions: Predictions | None
    anchors: Maps


@register_view(_DetectorWithHead)
class _ViewWithHead(DetectorView):
    @property
    def offers(self) -> tuple[str, ...]:
        predictions = self.model.predictions
        if predictions is None:
            return ("anchors",)
        return ("box_head",) if predictions.background else ("dense", "anchors")

    @property
    def num_classes(self) -> int:
        return self.model.predictions.num_classes

    def dense(self) -> Predictions:
        return self.model.predictions

    def box_head(self, proposals=None, classes=None) -> Predictions:
        return self.model.predictions

    def sampled_proposals(self) -> None:
        """No need of them: both heads have scored them already."""

    @property
    def anchor_levels(self) -> list[str]:
        return list(self.model.anchors)

    def anchors(self) -> Maps:
        return self.model.anchors

    def sample_boxes(self, capability: str) -> tuple[torch.Tensor, torch.Tensor]:
        predictions = self.model.predictions
        anchors = predictions.anchors
        return anchors, predictions.decode(torch.full_like(anchors, 0.1), anchors)


@contextlib.contextmanager
def replayed(
    maps: Maps,
    strides: dict[str, int],
    role: str,
    predictions: Predictions | None = None,
    anchors: Maps | None = None,
) -> Iterator[DetectorView]:
    """The view of a detector whose neck has just returned ``maps``, (N, C, H, W) by level name, and
    whose head, if it has one, ``predictions``; ``anchors`` are (H, W, A, 4) by level name."""
    has_head = predictions is not None or anchors is not None
    detector = (_DetectorWithHead if has_head else _Detector)(_Replay(maps, strides))
    detector.predictions, detector.anchors = predictions, anchors or {}
    view = build_view(detector, role)
    with view.recording():
        view.model.backbone(torch.empty(0))
        yield view


def feature_loss(loss: DistillLoss, student: Maps, teacher: Maps) -> dict[str, torch.Tensor]:
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
