"""SSD as a detectron2 meta-architecture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import batched_nms
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances
from torch.nn.utils.rnn import pad_sequence

from distill_d2.plugins import register_if_free
from distill_d2.views.matching import batched_iou
from distill_d2.views.predictions import by_position, encoder_of, rows_of

from .head import SSDHead
from .levels import SSDLevels
from .multibox import Targets, match_priors, multibox_losses
from .priors import SSDPriors

# Variances 0.1 and 0.2 of the original, inverted.
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)


@register_if_free(META_ARCH_REGISTRY)
class SSD(DenseDetector):
    """Single Shot MultiBox Detector (Liu et al., ECCV 2016, arXiv 1512.02325).

    Images have one fixed size. The background is the last class, as everywhere in detectron2.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: SSDHead,
        head_in_features: Sequence[str],
        priors: SSDPriors,
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "RGB",
        iou_threshold: float = 0.5,
        negatives_per_positive: float = 3.0,
        test_score_thresh: float = 0.01,
        test_topk_candidates: int = 200,
        test_nms_thresh: float = 0.45,
        max_detections_per_image: int = 200,
    ):
        """
        Args:
            head_in_features: names of the levels that the head reads.
            num_classes: foreground classes.
            pixel_mean, pixel_std: of the channels in the order of ``input_format``.
            iou_threshold, negatives_per_positive: see ``multibox``.
            test_score_thresh, test_topk_candidates (per class), test_nms_thresh: of inference.
        """
        super().__init__(backbone, head, head_in_features, pixel_mean=pixel_mean, pixel_std=pixel_std)
        self.anchor_generator = priors
        self.box2box_transform = Box2BoxTransform(weights=BOX_WEIGHTS)
        self.num_classes = num_classes
        self.input_format = input_format
        self.iou_threshold = iou_threshold
        self.negatives_per_positive = negatives_per_positive
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.SSD
        backbone, names = build_backbone(cfg), [f"s{stride}" for stride in node.STRIDES]
        if not set(names) & set(backbone.output_shape()):  # not one of SSD's own
            backbone = SSDLevels(backbone, node.STRIDES, node.SIZE, node.EXTRA_CHANNELS)
        shapes = backbone.output_shape()
        missing = [name for name in names if name not in shapes]
        if missing:
            raise ValueError(
                f"MODEL.SSD.STRIDES is {list(node.STRIDES)}, but the backbone has no levels {missing}; it has "
                f"{list(shapes)}"
            )
        priors = SSDPriors(node.SIZE, node.STRIDES, node.MIN_SIZES, node.MAX_SIZES, node.ASPECT_RATIOS)
        levels = [shapes[name] for name in names]
        return {
            "backbone": backbone,
            "head": SSDHead(levels, priors.num_priors, node.NUM_CLASSES, node.LITE_HEAD),
            "head_in_features": names,
            "priors": priors,
            "num_classes": node.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
            "iou_threshold": node.IOU_THRESHOLD,
            "negatives_per_positive": node.NEGATIVES_PER_POSITIVE,
            "test_score_thresh": node.SCORE_THRESH_TEST,
            "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": node.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    def preprocess_image(self, batched_inputs: list[dict[str, torch.Tensor]]) -> ImageList:
        """Like DenseDetector. Raises ValueError if an image has another size than MODEL.SSD.SIZE."""
        size = self.anchor_generator.size
        for item in batched_inputs:
            if tuple(item["image"].shape[-2:]) != (size, size):
                raise ValueError(
                    f"SSD takes images of {size}x{size} pixels (MODEL.SSD.SIZE), '{item.get('file_name', '')}' "
                    f"comes with {tuple(item['image'].shape[-2:])}; set INPUT.FIXED_SIZE to [{size}, {size}] "
                    "(DefaultPredictor does not read it: resize the image before)"
                )
        return super().preprocess_image(batched_inputs)

    def forward_training(
        self,
        _images: ImageList,
        features: list[torch.Tensor],
        predictions: list[list[torch.Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, torch.Tensor]:
        logits, deltas = self._rows(predictions)
        anchors = self._anchors(features)
        targets = self.targets(features, gt_instances)
        encode = encoder_of(self.box2box_transform)
        target = encode(targets.boxes, anchors.expand_as(targets.boxes))
        return multibox_losses(logits, deltas, targets, target, self.negatives_per_positive)

    @torch.no_grad()
    def targets(self, features: list[torch.Tensor], gt_instances: list[Instances]) -> Targets:
        """What the prior boxes of N images should predict."""
        boxes = pad_sequence([x.gt_boxes.tensor for x in gt_instances], batch_first=True)
        classes = pad_sequence([x.gt_classes for x in gt_instances], batch_first=True)
        counts = torch.tensor([len(x) for x in gt_instances])
        valid = torch.arange(boxes.shape[1]) < counts[:, None]
        if boxes.shape[1] == 0:
            boxes, classes = boxes.new_zeros(len(boxes), 1, 4), classes.new_zeros(len(boxes), 1)
            valid = torch.zeros(len(boxes), 1, dtype=torch.bool)
        valid = valid.to(boxes.device, non_blocking=True)
        index, positive = self.match(boxes, valid, features)
        background = torch.full_like(index, self.num_classes)
        matched = boxes.gather(1, index[..., None].expand(-1, -1, 4))
        # An area for the logarithm of what is not used.
        matched = torch.where(positive[..., None], matched, self._anchors(features))
        return Targets(torch.where(positive, classes.gather(1, index), background), matched, positive)

    def match(
        self, boxes: torch.Tensor, valid: torch.Tensor, features: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``match_priors`` of objects (N, G, 4), absolute XYXY, to the prior boxes of these levels."""
        priors = self.anchor_generator
        iou = batched_iou(boxes / priors.size, priors.relative(features))
        return match_priors(iou, valid, self.iou_threshold)

    def forward_inference(
        self,
        images: ImageList,
        features: list[torch.Tensor],
        predictions: list[list[torch.Tensor]],
    ) -> list[Instances]:
        logits, deltas = self._rows(predictions)
        anchors = self._anchors(features)
        scores = logits.softmax(dim=-1)[..., :-1]
        return [
            self.detect(scores[i], deltas[i], anchors, size) for i, size in enumerate(images.image_sizes)
        ]

    def detect(
        self,
        scores: torch.Tensor,
        deltas: torch.Tensor,
        anchors: torch.Tensor,
        image_size: tuple[int, int],
    ) -> Instances:
        """One image's detections, by falling score.

        Args:
            scores: (R, K) probabilities of the foreground classes; deltas, anchors: (R, 4).
        """
        count = min(self.test_topk_candidates, len(scores))
        best, rows = scores.t().topk(count, dim=1)
        classes, rank = (best > self.test_score_thresh).nonzero(as_tuple=True)
        best, rows = best[classes, rank], rows[classes, rank]
        boxes = self.box2box_transform.apply_deltas(deltas[rows], anchors[rows])
        keep = batched_nms(boxes, best, classes, self.test_nms_thresh)
        keep = keep[: self.max_detections_per_image]
        return Instances(
            image_size, pred_boxes=Boxes(boxes[keep]), scores=best[keep], pred_classes=classes[keep]
        )

    def _rows(self, predictions: list[list[torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The head's outputs as (N, R, K + 1) and (N, R, 4)."""
        logits, deltas = predictions
        classes = self.num_classes + 1
        return (
            rows_of([by_position(level.float(), classes) for level in logits]),
            rows_of([by_position(level.float(), 4) for level in deltas]),
        )

    def _anchors(self, features: list[torch.Tensor]) -> torch.Tensor:
        return Boxes.cat(self.anchor_generator(features)).tensor
