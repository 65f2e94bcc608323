"""The two-stage detectors' view: the RPN's anchors, proposals, and scores of given boxes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from .anchored import AnchoredHead, decode_sample
from .base import DetectorView, register_view
from .batch import Batch
from .matching import assign_by_iou, match_by_iou
from .predictions import Predictions, decoder_of, encoder_of

_RPN_HEAD = "proposal_generator.rpn_head"
_PREDICTOR = "roi_heads.box_predictor"


@register_view(GeneralizedRCNN)
class RCNNView(DetectorView):
    image_heads = ("rpn",)
    class_losses = ("loss_cls", "loss_rpn_cls")
    box_losses = ("loss_box_reg", "loss_rpn_loc")

    def __init__(self, model: nn.Module, role: str):
        super().__init__(model, role)
        heads, generator = self.model.roi_heads, self.model.proposal_generator
        if isinstance(generator, RPN) and isinstance(generator.box2box_transform, Box2BoxTransform):
            self.offers += ("rpn", "anchors")  # not a rotated one
        if isinstance(heads, StandardROIHeads) and not isinstance(heads, CascadeROIHeads):
            self.offers += ("score_boxes", "box_head", *(("own_proposals",) if self.offers else ()))

    @property
    def num_classes(self) -> int:
        return self.model.roi_heads.num_classes

    def require(self, capability: str) -> None:
        super().require(capability)
        if capability == "rpn":
            self.taps.add(_RPN_HEAD)
        if capability == "box_head":
            self._check_box_head()
            self.taps.add("roi_heads")
            self.taps.add(_PREDICTOR)

    def rpn(self) -> Predictions:
        return self._rpn().predictions(self)

    @property
    def anchor_levels(self) -> Sequence[str]:
        return self.model.proposal_generator.in_features

    def anchors(self) -> dict[str, torch.Tensor]:
        return self._rpn().grids(self)

    def box_head(
        self,
        proposals: list[Boxes] | None = None,
        classes: list[torch.Tensor] | None = None,
    ) -> Predictions:
        if proposals is None:
            proposals = self.sampled_proposals()
            classes = [per_image.gt_classes for per_image in self._sampled()]
            counts = [len(boxes) for boxes in proposals]
            logits, deltas = (output.split(counts) for output in self.own_output(_PREDICTOR))
        else:
            # Several losses share one pass for the same Boxes objects.
            logits, deltas = self.once(("scores", *proposals), lambda: self.score_boxes(proposals))
        boxes, logits, deltas, valid = _padded([b.tensor for b in proposals], logits, deltas)
        heads = self.model.roi_heads
        return Predictions(
            logit_levels=[logits.unsqueeze(2)],
            delta_levels=[deltas.unsqueeze(2)],
            anchors=boxes,
            decode=decoder_of(heads.box_predictor.box2box_transform),
            match=lambda others, kept: match_by_iou(heads.proposal_matcher, others, kept, boxes),
            background=True,
            valid=valid,
            classes=None
            if classes is None
            else _padded_classes(classes, heads.num_classes, valid.shape[1]),
            encode=encoder_of(heads.box_predictor.box2box_transform),
            assign=lambda others, kept: assign_by_iou(others, kept, boxes),
        )

    def sampled_proposals(self) -> list[Boxes]:
        return self.once("sampled", lambda: [each.proposal_boxes for each in self._sampled()])

    def own_proposals(self, batch: Batch) -> tuple[list[Boxes], list[torch.Tensor]]:
        """The proposals of its RPN in evaluation and the ground truth, sampled as for its box head's loss.

        Both steps are detectron2's own and wait for the device.
        """
        return self.once("own proposals", lambda: self._own_proposals(batch))

    def score_boxes(self, boxes: list[Boxes]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Run the box head on N images' boxes (absolute XYXY pixels on the augmented image).

        Returns:
            per image, class logits (R_i, K + 1), background last, and deltas (R_i, 4K) or (R_i, 4).
        """
        heads = self.model.roi_heads
        features = [self.features[name] for name in heads.box_in_features]
        with self.context():
            pooled = heads.box_pooler(features, boxes)
            logits, deltas = heads.box_predictor(heads.box_head(pooled))
        counts = [len(per_image) for per_image in boxes]
        return list(logits.float().split(counts)), list(deltas.float().split(counts))

    def sample_boxes(self, capability: str) -> tuple[torch.Tensor, torch.Tensor]:
        if capability == "rpn":
            return self._rpn().sample()
        boxes = torch.tensor([[8.0, 8.0, 40.0, 24.0]])  # any: the proposals are shared
        return boxes, decode_sample(self.model.roi_heads.box_predictor.box2box_transform, boxes)

    def _sampled(self) -> list[Instances]:
        sampled, _ = self.taps.output("roi_heads")
        return sampled

    def _own_proposals(self, batch: Batch) -> tuple[list[Boxes], list[torch.Tensor]]:
        images = ImageList(torch.empty(0), batch.image_sizes)  # only the sizes are read
        # The teacher must not log into the student's event storage.
        with self.context(), EventStorage():
            proposals, _ = self.model.proposal_generator(images, self.features)
            sampled = self.model.roi_heads.label_and_sample_proposals(proposals, batch.instances())
        return [each.proposal_boxes for each in sampled], [each.gt_classes for each in sampled]

    def _rpn(self) -> AnchoredHead:
        rpn = self.model.proposal_generator
        return AnchoredHead(
            path=_RPN_HEAD,
            in_features=rpn.in_features,
            classes=1,
            anchor_generator=rpn.anchor_generator,
            transform=rpn.box2box_transform,
            match=lambda boxes, valid, anchors: match_by_iou(
                rpn.anchor_matcher, boxes, valid, Boxes.cat(anchors).tensor
            ),
        )

    def _check_box_head(self) -> None:
        heads = self.model.roi_heads
        if heads.box_predictor.use_sigmoid_ce:
            raise ValueError(
                f"the {self.role}'s box head has a sigmoid per class (MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE "
                "is True); a softmax with background is expected"
            )
        if heads.train_on_pred_boxes and self.role == "student":
            raise ValueError(
                "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES is True: the student replaces its proposals "
                "after it has scored them, so that a teacher cannot score the same ones; set it to False"
            )


def _padded(
    boxes: list[torch.Tensor], logits: list[torch.Tensor], deltas: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad N images' rows with zeros to the largest number R of rows, at least 1.

    Args:
        boxes: (R_i, 4) of each image.
        logits: (R_i, K) of each image.
        deltas: (R_i, D) of each image.

    Returns:
        boxes (N, R, 4), logits (N, R, K), deltas (N, R, D), and (N, R) bool, False in padding.
    """
    counts = [len(per_image) for per_image in boxes]
    full = torch.ones(len(boxes), max(1, *counts), dtype=torch.bool, device=boxes[0].device)
    for row, count in zip(full, counts):
        row[count:] = False
    padded_boxes, padded_logits, padded_deltas = (
        # With the one row of an image that is dropped, so that there is at least one.
        pad_sequence([*part, part[0].new_zeros(1, part[0].shape[1])], batch_first=True)[:-1]
        for part in (boxes, logits, deltas)
    )
    return padded_boxes, padded_logits, padded_deltas, full


def _padded_classes(classes: list[torch.Tensor], background: int, length: int) -> torch.Tensor:
    """Pad N images' classes (R_i,) with background: (N, length)."""
    filled = [*classes, classes[0].new_zeros(length)]
    return pad_sequence(filled, batch_first=True, padding_value=background)[:-1]
