"""FCOS as a detectron2 proposal generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.proposal_generator import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn

from distill_d2.plugins import register_if_free

from .head import FCOSHead
from .inference import Selection
from .losses import FCOSLoss
from .targets import FCOSAssigner, Points, Targets


@register_if_free(PROPOSAL_GENERATOR_REGISTRY)
class FCOS(nn.Module):
    """Fully Convolutional One-Stage detection (Tian et al., ICCV 2019, arXiv 1904.01355, in its version
    of arXiv 2006.09214), with the parameters of AdelaiDet's.

    Locations are squares of their stride's size, as anchors of detectron2.
    """

    @configurable
    def __init__(
        self,
        *,
        head: FCOSHead,
        in_features: Sequence[str],
        strides: Sequence[int],
        num_classes: int,
        assigner: FCOSAssigner,
        loss: FCOSLoss,
        test_selection: Selection,
        train_selection: Selection | None = None,
        yield_box_features: bool = False,
    ):
        """
        Args:
            in_features, strides: of the levels that the head reads, from fine to coarse.
            num_classes: foreground classes.
            train_selection: of the proposals that are returned in training; None: there are none.
            yield_box_features: also return the box tower's outputs.
        """
        super().__init__()
        self.fcos_head = head
        self.in_features = list(in_features)
        self.num_classes = num_classes
        self.assigner = assigner
        self.loss = loss
        self.test_selection = test_selection
        self.train_selection = train_selection
        self.yield_box_features = yield_box_features
        self.anchor_generator = DefaultAnchorGenerator(
            sizes=[[stride] for stride in strides], aspect_ratios=[1.0], strides=strides, offset=0.5
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        node = cfg.MODEL.FCOS
        shapes = _levels(node, input_shape)
        train, test = (
            Selection(
                threshold=node[f"INFERENCE_TH_{phase}"],
                with_quality=node.THRESH_WITH_CTR,
                pre_nms_topk=node[f"PRE_NMS_TOPK_{phase}"],
                nms_threshold=node.NMS_TH,
                post_nms_topk=node[f"POST_NMS_TOPK_{phase}"],
            )
            for phase in ("TRAIN", "TEST")
        )
        return {
            "head": FCOSHead(
                channels=shapes[0].channels,
                num_levels=len(shapes),
                num_classes=node.NUM_CLASSES,
                num_share_convs=node.NUM_SHARE_CONVS,
                num_cls_convs=node.NUM_CLS_CONVS,
                num_box_convs=node.NUM_BOX_CONVS,
                norm=node.NORM,
                deformable=node.USE_DEFORMABLE,
                use_scale=node.USE_SCALE,
                prior_prob=node.PRIOR_PROB,
            ),
            "in_features": node.IN_FEATURES,
            "strides": node.FPN_STRIDES,
            "num_classes": node.NUM_CLASSES,
            "assigner": FCOSAssigner(
                node.SIZES_OF_INTEREST, node.POS_RADIUS if node.CENTER_SAMPLE else None
            ),
            "loss": FCOSLoss(
                alpha=node.LOSS_ALPHA,
                gamma=node.LOSS_GAMMA,
                normalizer_cls=node.LOSS_NORMALIZER_CLS,
                weight_cls=node.LOSS_WEIGHT_CLS,
                box_loss=node.LOC_LOSS_TYPE,
                quality=node.BOX_QUALITY,
            ),
            "test_selection": test,
            "train_selection": train if node.YIELD_PROPOSAL else None,
            "yield_box_features": node.YIELD_BOX_FEATURES,
        }

    def forward(
        self,
        images: ImageList,
        features: dict[str, torch.Tensor],
        gt_instances: Sequence[Instances] | None = None,
        top_module: nn.Module | None = None,
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """
        Args:
            images: N of them; only the sizes are read.
            features: levels (N, C, H, W) by name.
            gt_instances: N images' objects, with gt_boxes and gt_classes; needed in training.
            top_module: applied to the box tower's outputs; what it returns is "top" in the extras, and
                in evaluation, per detection, "top_feat".

        Returns:
            in training, extras and losses; in evaluation, N images' detections (see Selection.detect)
            and {}. The extras: "targets", a Targets; "points", a Points; "logits" (N, K, R), "quality"
            (N, R) and, with ``top_module``, "top" (N, P, R), of all levels; "proposals" and
            "box_features" where the config asks for them.

        Raises:
            ValueError: no objects in training.
        """
        levels = [features[name] for name in self.in_features]
        modules = [module for module in (top_module,) if module is not None]
        if self.yield_box_features:
            modules.append(nn.Identity())
        outputs = self.fcos_head(levels, modules)
        box_features = outputs[-1] if self.yield_box_features else None
        outputs = outputs[: 3 + (top_module is not None)]
        anchors = self.anchor_generator(levels)
        if not self.training:
            return self.test_selection.detect(outputs, anchors, images.image_sizes), {}
        if gt_instances is None:
            raise ValueError("FCOS is trained without annotations: the inputs have no 'instances'")
        extras, losses = self._train(outputs, anchors, gt_instances)
        if self.train_selection is not None:
            extras["proposals"] = self.train_selection.detect(outputs, anchors, images.image_sizes)
        if box_features is not None:
            extras["box_features"] = dict(zip(self.in_features, box_features))
        return extras, losses

    def targets(
        self, anchors: Sequence[Boxes], gt_instances: Sequence[Instances]
    ) -> tuple[Points, Targets]:
        """What the locations of N images should predict; of ``anchor_generator``'s squares per level."""
        points = self.assigner.points(anchors)
        return points, self.assigner.targets(points, gt_instances, self.num_classes)

    def _train(
        self,
        outputs: Sequence[Sequence[torch.Tensor]],
        anchors: Sequence[Boxes],
        gt_instances: Sequence[Instances],
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        points, targets = self.targets(anchors, gt_instances)
        logits, ltrb, quality, *top = (
            torch.cat([level.flatten(2) for level in levels], dim=2) for levels in outputs
        )
        quality = quality.squeeze(1)
        losses = self.loss(logits, ltrb, quality, targets)
        extras = {"targets": targets, "points": points, "logits": logits, "quality": quality}
        return {**extras, **({"top": top[0]} if top else {})}, losses


def _levels(node: CfgNode, input_shape: dict[str, ShapeSpec]) -> list[ShapeSpec]:
    """The levels that the head reads. Raises ValueError if the keys of MODEL.FCOS do not fit them."""
    names, strides = list(node.IN_FEATURES), list(node.FPN_STRIDES)
    missing = [name for name in names if name not in input_shape]
    if missing or not names:
        raise ValueError(
            f"MODEL.FCOS.IN_FEATURES is {names}, but the backbone has the levels {list(input_shape)} "
            "(MODEL.FCOS.TOP_LEVELS adds p6 and p7)"
        )
    shapes = [input_shape[name] for name in names]
    found = [shape.stride for shape in shapes]
    if strides != found:
        raise ValueError(f"MODEL.FCOS.FPN_STRIDES is {strides}, but {names} have the strides {found}")
    sizes = list(node.SIZES_OF_INTEREST)
    if len(sizes) != len(names) - 1 or sizes != sorted(sizes):
        raise ValueError(
            f"MODEL.FCOS.SIZES_OF_INTEREST is {sizes}; expected {len(names) - 1} rising distances in "
            f"pixels, one between each two of the levels {names}"
        )
    if len({shape.channels for shape in shapes}) > 1:
        raise ValueError(
            f"MODEL.FCOS.IN_FEATURES {names} have {[s.channels for s in shapes]} channels; the head is "
            "shared, so they must be equal"
        )
    return shapes
