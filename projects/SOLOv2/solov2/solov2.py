"""SOLOv2 as a detectron2 meta-architecture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import move_device_like
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.backbone import Backbone
from detectron2.structures import ImageList, Instances
from torch import nn

from distill_d2.plugins import register_if_free

from .check import check_solov2_config
from .head import SOLOv2InstanceHead, SOLOv2MaskHead
from .inference import InstanceSelection
from .losses import class_loss, mask_loss
from .nms import point_nms
from .targets import GridTargets


@register_if_free(META_ARCH_REGISTRY)
class SOLOv2(nn.Module):
    """Instance segmentation without boxes (Wang et al., SOLOv2: Dynamic and Fast Instance Segmentation,
    NeurIPS 2020, arXiv 2003.10152)."""

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        ins_head: SOLOv2InstanceHead,
        mask_head: SOLOv2MaskHead,
        ins_in_features: Sequence[str],
        mask_in_features: Sequence[str],
        targets: GridTargets,
        selection: InstanceSelection,
        num_classes: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "BGR",
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        focal_weight: float = 1.0,
        dice_weight: float = 3.0,
    ):
        """
        Args:
            ins_in_features, mask_in_features: levels that the heads read, fine to coarse.
            targets: what the cells should predict; selection: which of them are detections.
            num_classes: foreground classes.
            pixel_mean, pixel_std: of the channels in the order of ``input_format``.
            focal_alpha, focal_gamma, focal_weight: of the classes' loss; dice_weight: of the masks'.
        """
        super().__init__()
        self.backbone = backbone
        self.ins_head = ins_head
        self.mask_head = mask_head
        self.ins_in_features = list(ins_in_features)
        self.mask_in_features = list(mask_in_features)
        self.mask_stride = backbone.output_shape()[self.mask_in_features[0]].stride
        self.targets = targets
        self.selection = selection
        self.num_classes = num_classes
        self.input_format = input_format
        self.focal = (focal_alpha, focal_gamma)
        self.loss_weights = {"loss_ins": dice_weight, "loss_cate": focal_weight}
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.SOLOV2
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        check_solov2_config(node, shapes, backbone.size_divisibility)
        return {
            "backbone": backbone,
            "ins_head": SOLOv2InstanceHead(
                in_channels=node.INSTANCE_IN_CHANNELS,
                channels=node.INSTANCE_CHANNELS,
                num_convs=node.NUM_INSTANCE_CONVS,
                num_classes=node.NUM_CLASSES,
                num_kernels=node.NUM_KERNELS,
                num_grids=node.NUM_GRIDS,
                in_strides=[shapes[name].stride for name in node.INSTANCE_IN_FEATURES],
                strides=node.FPN_INSTANCE_STRIDES,
                coordinates=node.USE_COORD_CONV,
                norm=node.NORM,
                prior_prob=node.PRIOR_PROB,
            ),
            "mask_head": SOLOv2MaskHead(
                in_channels=node.MASK_IN_CHANNELS,
                channels=node.MASK_CHANNELS,
                num_masks=node.NUM_MASKS,
                num_levels=len(node.MASK_IN_FEATURES),
                coordinates=node.USE_COORD_CONV,
                norm=node.NORM,
            ),
            "ins_in_features": node.INSTANCE_IN_FEATURES,
            "mask_in_features": node.MASK_IN_FEATURES,
            "targets": GridTargets(
                node.NUM_CLASSES,
                node.NUM_GRIDS,
                node.FPN_SCALE_RANGES,
                node.SIGMA,
                node.MAX_INSTANCES_TRAIN,
            ),
            "selection": InstanceSelection(
                score_threshold=node.SCORE_THR,
                mask_threshold=node.MASK_THR,
                nms_type=node.NMS_TYPE,
                nms_kernel=node.NMS_KERNEL,
                nms_sigma=node.NMS_SIGMA,
                pre_nms=node.NMS_PRE,
                update_threshold=node.UPDATE_THR,
                max_instances=node.MAX_PER_IMG,
            ),
            "num_classes": node.NUM_CLASSES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
            "focal_alpha": node.LOSS.FOCAL_ALPHA,
            "focal_gamma": node.LOSS.FOCAL_GAMMA,
            "focal_weight": node.LOSS.FOCAL_WEIGHT,
            "dice_weight": node.LOSS.DICE_WEIGHT,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict[str, Any]]):
        """detectron2's model interface.

        Args:
            batched_inputs: N dicts with "image" (3, H_i, W_i); in training "instances" with gt_boxes,
                gt_classes and gt_masks (polygons or bit masks); in evaluation, optionally, "height" and
                "width" of the output.

        Returns:
            in training {"loss_ins", "loss_cate"}; in evaluation N dicts {"instances"} with scores,
            pred_classes, pred_masks (n, height, width) bool, and pred_boxes around the masks.

        Raises:
            ValueError: the images come without masks in training.
        """
        images = self.preprocess_image(batched_inputs)
        logits, kernels, features = self.predict(self.backbone(images.tensor))
        if self.training:
            instances = [item["instances"] for item in batched_inputs]
            return self.losses(logits, kernels, features, instances)
        outputs = [
            (item.get("height", size[0]), item.get("width", size[1]))
            for item, size in zip(batched_inputs, images.image_sizes)
        ]
        found = self.instances(logits, kernels, features, images.image_sizes, outputs)
        return [{"instances": per_image} for per_image in found]

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Normalized images, padded to one size."""
        images = [move_device_like(item["image"], self.pixel_mean) for item in batched_inputs]
        return ImageList.from_tensors(
            [(image - self.pixel_mean) / self.pixel_std for image in images],
            self.backbone.size_divisibility,
            padding_constraints=self.backbone.padding_constraints,
        )

    def predict(
        self, levels: dict[str, torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        """Class logits (N, K, S, S), kernels (N, D, S, S), per level; mask features (N, D, H, W)."""
        logits, kernels = self.ins_head([levels[name] for name in self.ins_in_features])
        return logits, kernels, self.mask_head([levels[name] for name in self.mask_in_features])

    def losses(
        self,
        logits: list[torch.Tensor],
        kernels: list[torch.Tensor],
        features: torch.Tensor,
        instances: Sequence[Instances],
    ) -> dict[str, torch.Tensor]:
        """Of what ``predict`` returned for N images with these ground truths; in float32."""
        padded = self._padded_size(features)
        objects = [self.targets.objects(image, padded, self.device) for image in instances]
        targets = self.targets(objects, padded, self.mask_stride)
        classes = torch.stack([image.classes for image in targets])
        with torch.autocast(self.device.type, enabled=False):
            losses = {
                "loss_ins": mask_loss(cells_of(kernels), features.float(), targets),
                "loss_cate": class_loss(cells_of(logits), classes, *self.focal),
            }
        return {name: loss * self.loss_weights[name] for name, loss in losses.items()}

    def instances(
        self,
        logits: list[torch.Tensor],
        kernels: list[torch.Tensor],
        features: torch.Tensor,
        image_sizes: Sequence[tuple[int, int]],
        output_sizes: Sequence[tuple[int, int]],
    ) -> list[Instances]:
        """The detections in N images of these (height, width), in those of the outputs."""
        scores = cells_of([point_nms(level.float().sigmoid()) for level in logits])
        weights, padded = cells_of(kernels), self._padded_size(features)
        smallest = torch.cat(
            [
                torch.full((level[0, 0].numel(),), stride, device=self.device)
                for level, stride in zip(logits, self.ins_head.strides)
            ]
        )
        with torch.autocast(self.device.type, enabled=False):  # areas are too large for float16
            return [
                self.selection(scores[i], weights[i], smallest, features[i].float(), (padded, *sizes))
                for i, sizes in enumerate(zip(image_sizes, output_sizes))
            ]

    def _padded_size(self, features: torch.Tensor) -> tuple[int, int]:
        height, width = features.shape[-2:]
        return height * self.mask_stride, width * self.mask_stride


def cells_of(levels: Sequence[torch.Tensor]) -> torch.Tensor:
    """Maps (N, C, S, S) of all levels as rows (N, R, C), float32; inside a level row by row."""
    return torch.cat([level.float().flatten(2) for level in levels], dim=2).transpose(1, 2)
