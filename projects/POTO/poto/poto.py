"""POTO as a detectron2 meta-architecture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances
from distill_d2.projects.fcos.losses import rank_mean
from fvcore.nn import sigmoid_focal_loss_jit

from distill_d2.plugins import register_if_free
from distill_d2.tracing import at_most
from distill_d2.views.matching import batched_iou, giou_distance

from .assignment import Pairs, inside, match_quality, near_center, one_to_many, one_to_one
from .head import POTOHead

Levels = list[torch.Tensor]


class Rows(NamedTuple):
    """What a head computed for R locations of N images, in float32.

    Attributes:
        logits: (N, R, K); filtered: (N, R, K), those whose sigmoids are the scores, the same ones
            where there is no max filter.
        deltas: (N, R, 4), in strides.
        anchors: (R, 4), squares around the locations with their strides as sides.
        sizes: number of locations of each level; they add up to R.
    """

    logits: torch.Tensor
    filtered: torch.Tensor
    deltas: torch.Tensor
    anchors: torch.Tensor
    sizes: list[int]


class Targets(NamedTuple):
    """What a head should have computed.

    Attributes:
        pairs: M locations with an object.
        boxes: (M, 4) absolute XYXY; classes: (M,) int64 of these objects.
        auxiliary: (N, R) int64, the classes for the auxiliary loss, K where there is none.
    """

    pairs: Pairs
    boxes: torch.Tensor
    classes: torch.Tensor
    auxiliary: torch.Tensor | None


@register_if_free(META_ARCH_REGISTRY)
class POTO(DenseDetector):
    """End-to-End Object Detection with Fully Convolutional Network (Wang et al., arXiv 2012.03544).

    An FCOS without centerness whose locations are assigned to objects one to one, by what they
    predict, so that its detections need no non-maximum suppression.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: POTOHead,
        head_in_features: Sequence[str],
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "BGR",
        alpha: float = 0.8,
        center_sampling_radius: float = 1.5,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        reg_weight: float = 2.0,
        aux_topk: int = 0,
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        max_detections_per_image: int = 100,
    ):
        """
        Args:
            head_in_features: names of the levels that the head reads.
            num_classes: foreground classes.
            alpha, center_sampling_radius (in strides): see ``assignment``.
            focal_alpha, focal_gamma: of the focal loss; reg_weight: of the box loss.
            aux_topk: candidates per object and level of the auxiliary loss; 0: without that loss.
            test_score_thresh, test_topk_candidates (per level): of inference.

        Raises:
            ValueError: alpha is not between 0 and 1; the message names the key.
        """
        super().__init__(
            backbone, head, list(head_in_features), pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        if not 0 <= alpha <= 1:
            raise ValueError(f"MODEL.POTO.ALPHA is {alpha}; expected a number from 0 to 1")
        shapes = backbone.output_shape()
        strides = [shapes[name].stride for name in head_in_features]
        self.anchor_generator = DefaultAnchorGenerator(
            sizes=[[stride] for stride in strides], aspect_ratios=[1.0], strides=strides
        )
        self.box2box_transform = Box2BoxTransformLinear(normalize_by_size=True)
        self.num_classes = num_classes
        self.input_format = input_format
        self.alpha = alpha
        self.center_sampling_radius = center_sampling_radius
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma
        self.reg_weight = reg_weight
        self.aux_topk = aux_topk
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.max_detections_per_image = max_detections_per_image

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.POTO
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        missing = [name for name in node.IN_FEATURES if name not in shapes]
        if missing:
            raise ValueError(
                f"MODEL.POTO.IN_FEATURES is {list(node.IN_FEATURES)}, but the backbone has no levels "
                f"{missing}; it has {list(shapes)}"
            )
        if node.USE_AUX and node.AUX_TOPK < 1:
            raise ValueError(f"MODEL.POTO.AUX_TOPK is {node.AUX_TOPK}; expected at least 1")
        return {
            "backbone": backbone,
            "head": POTOHead(cfg, [shapes[name] for name in node.IN_FEATURES]),
            "head_in_features": node.IN_FEATURES,
            "num_classes": node.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
            "alpha": node.ALPHA,
            "center_sampling_radius": node.CENTER_SAMPLING_RADIUS,
            "focal_alpha": node.FOCAL_ALPHA,
            "focal_gamma": node.FOCAL_GAMMA,
            "reg_weight": node.REG_WEIGHT,
            "aux_topk": node.AUX_TOPK if node.USE_AUX else 0,
            "test_score_thresh": node.SCORE_THRESH_TEST,
            "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    def forward_training(
        self,
        _images: ImageList,
        features: Levels,
        predictions: Sequence[Levels],
        gt_instances: list[Instances],
    ) -> dict[str, torch.Tensor]:
        rows = self.rows(features, predictions)
        return self.losses(rows, self.targets(rows, gt_instances))

    def rows(self, features: Levels, predictions: Sequence[Levels]) -> Rows:
        """What the head computed from these levels."""
        logits, filtered, deltas = self._levels(predictions)
        anchors = self.anchor_generator(features)
        whole = torch.cat(logits, dim=1)
        return Rows(
            logits=whole,
            filtered=whole if filtered is logits else torch.cat(filtered, dim=1),
            deltas=torch.cat(deltas, dim=1),
            anchors=Boxes.cat(anchors).tensor,
            sizes=[len(boxes) for boxes in anchors],
        )

    @torch.no_grad()
    def targets(self, rows: Rows, gt_instances: list[Instances]) -> Targets:
        """What the head should have computed for N images. The host waits for the device once."""
        qualities, auxiliary = [], []
        for image, gt in enumerate(gt_instances):
            boxes, classes = gt.gt_boxes.tensor, gt.gt_classes
            iou = batched_iou(boxes, self._decode(rows.deltas[image], rows.anchors))
            quality = match_quality(rows.filtered[image].t()[classes], iou, self.alpha)
            near = near_center(boxes, rows.anchors, self.center_sampling_radius)
            qualities.append(torch.where(near, quality, -1.0))
            if self.aux_topk:
                quality = match_quality(rows.logits[image].t()[classes], iou, self.alpha)
                allowed = inside(boxes, rows.anchors)
                objects = one_to_many(quality, allowed, rows.sizes, self.aux_topk)
                background = classes.new_full((1,), self.num_classes)
                auxiliary.append(torch.cat([classes, background])[objects])  # -1, none, is the last
        pairs = one_to_one(qualities)
        boxes = torch.cat([gt.gt_boxes.tensor for gt in gt_instances])[pairs.objects]
        classes = torch.cat([gt.gt_classes for gt in gt_instances])[pairs.objects]
        return Targets(pairs, boxes, classes, torch.stack(auxiliary) if auxiliary else None)

    def losses(self, rows: Rows, targets: Targets) -> dict[str, torch.Tensor]:
        """Focal loss and GIoU loss, divided by the number of objects, and the auxiliary focal loss,
        divided by that of its locations with an object: means over all processes, at least 1.

        Returns:
            {"loss_cls", "loss_box_reg"}, and "loss_cls_aux" with ``aux_topk``.
        """
        images, locations, _ = targets.pairs
        target = torch.zeros_like(rows.filtered)
        target[images, locations, targets.classes] = 1.0
        boxes = self._decode(rows.deltas[images, locations], rows.anchors[locations])
        count = _at_least_one(target.new_full((), len(images)))
        losses = {
            "loss_cls": self._focal_loss(rows.filtered, target) / count,
            "loss_box_reg": self.reg_weight * giou_distance(boxes, targets.boxes).sum() / count,
        }
        if targets.auxiliary is not None:
            every = torch.arange(self.num_classes, device=target.device)
            target = (targets.auxiliary[..., None] == every).to(target)
            count = _at_least_one(target.sum())
            losses["loss_cls_aux"] = self._focal_loss(rows.logits, target) / count
        return losses

    def forward_inference(
        self, images: ImageList, features: Levels, predictions: Sequence[Levels]
    ) -> list[Instances]:
        _, filtered, deltas = self._levels(predictions)
        anchors = self.anchor_generator(features)
        return [
            self.detect([x[i].sigmoid() for x in filtered], [x[i] for x in deltas], anchors, size)
            for i, size in enumerate(images.image_sizes)
        ]

    def detect(
        self, scores: Levels, deltas: Levels, anchors: list[Boxes], image_size: tuple[int, int]
    ) -> Instances:
        """One image's detections, by falling score.

        Args:
            scores: per level (P, K) probabilities; deltas: per level (P, 4).
        """
        thresholds = self.test_score_thresh, self.test_topk_candidates
        found = self._decode_multi_level_predictions(anchors, scores, deltas, *thresholds, image_size)
        count = at_most(found.scores.shape[0], self.max_detections_per_image)
        return found[found.scores.topk(count).indices]

    def _levels(self, predictions: Sequence[Levels]) -> tuple[Levels, Levels, Levels]:
        """Logits (N, P, K) of each level, those after the max filter, and deltas (N, P, 4)."""
        lengths = [self.num_classes, 4, 1][: len(predictions)]
        predictions = [[level.float() for level in levels] for levels in predictions]
        logits, deltas, *filters = self._transpose_dense_predictions(predictions, lengths)
        filtered = list(map(product_logits, logits, *filters)) if filters else logits
        return logits, filtered, deltas

    def _decode(self, deltas: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        return self.box2box_transform.apply_deltas(deltas, anchors)

    def _focal_loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return sigmoid_focal_loss_jit(
            logits, target, alpha=self.focal_alpha, gamma=self.focal_gamma, reduction="sum"
        )


def product_logits(logits: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Logits z of the products of two probabilities, sigmoid(z) = sigmoid(x) sigmoid(y).

    e^-z = e^-x + e^-y + e^-(x + y). Losses on logits can use them, and nothing is lost where
    probabilities are close to 0 or 1.
    """
    return -torch.logaddexp(F.softplus(-others) - logits, -others)


def _at_least_one(count: torch.Tensor) -> torch.Tensor:
    (mean,) = rank_mean(count)
    return mean.clamp(min=1.0)
