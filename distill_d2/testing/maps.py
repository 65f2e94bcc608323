"""Views of detectors whose neck, and head, return given tensors: losses on literal and on recorded numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.structures import Boxes
from torch import nn

from ..losses import DistillLoss
from ..views import Batch, DetectorView, Predictions

Maps = dict[str, torch.Tensor]


class _Maps(Backbone):
    def __init__(self, maps: Maps, strides: dict[str, int]):
        super().__init__()
        self.maps, self.strides = maps, strides

    def forward(self, _images: torch.Tensor | None) -> Maps:
        return self.maps

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            name: ShapeSpec(channels=feature.shape[1], stride=self.strides[name])
            for name, feature in self.maps.items()
        }


class MapDetector(nn.Module):
    """A detector of a backbone alone."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone


class GivenView(DetectorView):
    """A view of given maps, predictions and anchors; it offers what it was given."""

    def __init__(
        self,
        model: nn.Module,
        role: str,
        predictions: Predictions | None = None,
        anchors: Maps | None = None,
    ):
        super().__init__(model, role)
        self._predictions = predictions
        self._anchors = anchors
        if predictions is not None:
            self.offers = ("box_head",) if predictions.background else ("dense",)
        if anchors is not None and "box_head" not in self.offers:
            self.offers += ("anchors",)

    @property
    def predictions(self) -> Predictions:
        """The given predictions."""
        assert self._predictions is not None, "the view was given no predictions"
        return self._predictions

    @property
    def num_classes(self) -> int:
        return 0 if self._predictions is None else self._predictions.num_classes

    def dense(self) -> Predictions:
        return self.predictions

    def box_head(
        self,
        proposals: Sequence[Boxes] | None = None,
        classes: Sequence[torch.Tensor] | None = None,
    ) -> Predictions:
        return self.predictions

    def sampled_proposals(self) -> list[Boxes]:
        """None: both heads have scored them already."""
        return []

    @property
    def anchor_levels(self) -> list[str]:
        return list(self._anchors or {})

    def anchors(self) -> Maps:
        assert self._anchors is not None, "the view was given no anchors"
        return self._anchors

    def sample_boxes(self, capability: str) -> tuple[torch.Tensor, torch.Tensor]:
        anchors = self.predictions.anchors[..., :2, :]
        return anchors, self.predictions.decode(torch.full_like(anchors, 0.1), anchors)


def view_of(
    maps: Maps,
    role: str,
    strides: dict[str, int] | None = None,
    predictions: Predictions | None = None,
    anchors: Maps | None = None,
) -> GivenView:
    """A view, recording, of a detector whose neck has just returned ``maps``.

    Args:
        maps: (N, C, H, W) by level name.
        role: "student" or "teacher".
        strides: by level name; without them "p3" has stride 8.
        predictions: of its head, dense or, with ``background``, of a box head.
        anchors: (H, W, A, 4) by level name.
    """
    strides = strides or {name: 2 ** int(name[1:]) for name in maps}
    view = GivenView(MapDetector(_Maps(maps, strides)), role, predictions, anchors)
    view.taps.start()
    view.model.backbone(None)
    return view


def compare(
    loss: DistillLoss, student: Maps, teacher: Maps, strides: dict[str, int] | None = None
) -> dict[str, torch.Tensor]:
    """The terms of a loss, bound to and run on detectors with these maps; there is no ground truth."""
    views = view_of(student, "student", strides), view_of(teacher, "teacher", strides)
    loss.bind(*views)
    return loss(*views, Batch([], (0, 0), iteration=0, max_iter=1))


def plane(*rows: Sequence[float]) -> torch.Tensor:
    """One channel of one image: (1, 1, H, W)."""
    return torch.tensor(rows, dtype=torch.float32)[None, None]
