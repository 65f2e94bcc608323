"""OneStageDetector's view: FCOS' dense predictions, over squares of their stride's size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.structures import Boxes

from distill_d2.views.anchored import AnchoredHead
from distill_d2.views.base import DetectorView, register_view
from distill_d2.views.fcos import FCOSView

from .fcos import FCOS
from .inference import TRANSFORM
from .one_stage_detector import OneStageDetector

HEAD = "proposal_generator.fcos_head"


@register_view(OneStageDetector)
class OneStageDetectorView(FCOSView):
    """The features of any OneStageDetector, and the head of FCOS."""

    training_state = ("proposal_generator.loss.moving_positives",)

    @property
    def offers(self) -> tuple[str, ...]:
        return super().offers if isinstance(self.model.proposal_generator, FCOS) else ()

    @property
    def num_classes(self) -> int | None:
        return getattr(self.model.proposal_generator, "num_classes", None)

    def require(self, capability: str) -> None:
        DetectorView.require(self, capability)
        if capability == "dense":
            self.taps.add(HEAD)

    @property
    def anchor_levels(self) -> Sequence[str]:
        return self.model.proposal_generator.in_features

    def _head(self) -> AnchoredHead:
        fcos = self.model.proposal_generator
        return AnchoredHead(
            path=HEAD,
            in_features=fcos.in_features,
            classes=fcos.num_classes,
            anchor_generator=fcos.anchor_generator,
            transform=TRANSFORM,
            match=lambda boxes, valid, anchors: self._assign(boxes, valid, anchors)[1].to(torch.int8),
            assign=lambda boxes, valid: self._assign(boxes, valid, self._squares())[0],
        )

    def _squares(self) -> list[Boxes]:
        fcos = self.model.proposal_generator
        return fcos.anchor_generator([self.level(n, contiguous=False) for n in fcos.in_features])

    def _assign(
        self, boxes: torch.Tensor, valid: torch.Tensor, anchors: Sequence[Boxes]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """FCOS' own rule, once per step for the same tensors."""
        return self.once(("assign", boxes, valid), lambda: self._assigned(boxes, valid, anchors))

    def _assigned(
        self, boxes: torch.Tensor, valid: torch.Tensor, anchors: Sequence[Boxes]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assigner = self.model.proposal_generator.assigner
        points = assigner.points(anchors)
        found = [assigner.assign(points, *image) for image in zip(boxes, valid)]
        index, positive = zip(*found)
        return torch.stack(index), torch.stack(positive)
