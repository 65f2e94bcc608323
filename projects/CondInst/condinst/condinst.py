"""CondInst as a detectron2 meta-architecture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import ImageList, Instances
from distill_d2.projects.fcos import FCOS, OneStageDetector
from torch import nn

from distill_d2.plugins import register_if_free
from distill_d2.tracing import is_recorded

from .mask_branch import MaskBranch, aligned_bilinear
from .mask_head import DynamicMaskHead, dice_losses
from .selection import best_of_each_object, random_subset
from .truth import MaskTruth, mask_truth, semantic_loss


class Positives(NamedTuple):
    """M locations that predict a mask, image by image.

    Attributes:
        objects, levels: (M,) int64 index of the image's object, and of the level.
        locations: (M, 2) x, y in pixels.
        params: (M, P) parameters of the mask head.
        counts: the number of locations of each image.
    """

    objects: torch.Tensor
    levels: torch.Tensor
    locations: torch.Tensor
    params: torch.Tensor
    counts: list[int]


@register_if_free(META_ARCH_REGISTRY)
class CondInst(OneStageDetector):
    """Conditional Convolutions for Instance Segmentation (Tian et al., ECCV 2020, arXiv 2003.05664),
    with the parameters of AdelaiDet's: FCOS that also predicts a mask head for each instance."""

    @configurable
    def __init__(
        self,
        *,
        controller: nn.Module,
        mask_branch: MaskBranch,
        mask_head: DynamicMaskHead,
        num_classes: int,
        max_proposals: int = -1,
        topk_proposals_per_image: int = -1,
        max_instances_per_pass: int = 100,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        **kwargs: Any,
    ):
        """
        Args:
            controller: from the box tower's outputs to ``mask_head``'s parameters.
            num_classes: foreground classes.
            max_proposals: the number of positive locations of a batch, drawn at random, that have a mask
                loss; -1: all. Or topk_proposals_per_image: the number per image, the best ones of each
                object.
            max_instances_per_pass: the number of masks that are computed together in evaluation.
            focal_alpha, focal_gamma: of the semantic segmentation's loss.
            kwargs: of OneStageDetector.

        Raises:
            ValueError: both limits are given, or one is 0.
        """
        super().__init__(**kwargs)
        self.controller = controller
        self.mask_branch = mask_branch
        self.mask_head = mask_head
        self.num_classes = num_classes
        self.max_proposals = max_proposals
        self.topk_proposals_per_image = topk_proposals_per_image
        self.max_instances_per_pass = max_instances_per_pass
        self.focal = (focal_alpha, focal_gamma)
        self._check_limits()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        arguments = super().from_config(cfg)
        node, fcos = cfg.MODEL.CONDINST, cfg.MODEL.FCOS
        if not isinstance(arguments["proposal_generator"], FCOS):
            name = cfg.MODEL.PROPOSAL_GENERATOR.NAME
            raise ValueError(f"MODEL.PROPOSAL_GENERATOR.NAME is '{name}'; CondInst needs 'FCOS'")
        shapes = arguments["backbone"].output_shape()
        branch, names = node.MASK_BRANCH, list(node.MASK_BRANCH.IN_FEATURES)
        missing = [name for name in names if name not in shapes]
        if missing or not names:
            raise ValueError(
                f"MODEL.CONDINST.MASK_BRANCH.IN_FEATURES is {names}, but the backbone has the levels "
                f"{list(shapes)}"
            )
        sizes = list(fcos.SIZES_OF_INTEREST)
        head = DynamicMaskHead(
            in_channels=branch.OUT_CHANNELS,
            in_stride=shapes[names[0]].stride,
            out_stride=node.MASK_OUT_STRIDE,
            sizes_of_interest=[*sizes, sizes[-1] * 2],
            channels=node.MASK_HEAD.CHANNELS,
            num_layers=node.MASK_HEAD.NUM_LAYERS,
            relative_coordinates=not node.MASK_HEAD.DISABLE_REL_COORDS,
        )
        controller = nn.Conv2d(
            shapes[fcos.IN_FEATURES[0]].channels, head.num_params, kernel_size=3, padding=1
        )
        nn.init.normal_(controller.weight, std=0.01)
        nn.init.zeros_(controller.bias)
        return {
            **arguments,
            "controller": controller,
            "mask_branch": MaskBranch(
                in_features=names,
                in_channels=shapes[names[0]].channels,
                channels=branch.CHANNELS,
                out_channels=branch.OUT_CHANNELS,
                num_convs=branch.NUM_CONVS,
                norm=branch.NORM,
                semantic_classes=fcos.NUM_CLASSES if branch.SEMANTIC_LOSS_ON else 0,
                prior_prob=fcos.PRIOR_PROB,
            ),
            "mask_head": head,
            "num_classes": fcos.NUM_CLASSES,
            "max_proposals": node.MAX_PROPOSALS,
            "topk_proposals_per_image": node.TOPK_PROPOSALS_PER_IM,
            "max_instances_per_pass": node.MASK_HEAD.MAX_INSTANCES_PER_PASS,
            "focal_alpha": fcos.LOSS_ALPHA,
            "focal_gamma": fcos.LOSS_GAMMA,
        }

    def forward(self, batched_inputs: list[dict[str, Any]]):
        """Like GeneralizedRCNN. Detections have "pred_masks" (M, H, W) bool.

        Raises:
            ValueError: no annotations in training.
        """
        images = self._preprocess(batched_inputs)
        features = self.backbone(images.tensor)
        mask_features, semantic = self.mask_branch(features)
        if self.training:
            if any("instances" not in item for item in batched_inputs):
                raise ValueError("CondInst is trained without annotations: an input has no 'instances'")
            gt = [item["instances"].to(self.device) for item in batched_inputs]
            return self._losses(images, features, mask_features, semantic, gt)
        detections, _ = self.proposal_generator(images, features, None, self.controller)
        outputs = []
        for index, (found, item) in enumerate(zip(detections, batched_inputs)):
            height, width = found.image_size
            height, width = item.get("height", height), item.get("width", width)
            instances = detector_postprocess(found, height, width)
            instances.pred_masks = self._masks(
                instances, mask_features[index], found.image_size, (height, width)
            )
            outputs.append({"instances": instances})
        return outputs

    def _preprocess(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        images = [self._move_to_current_device(item["image"]) for item in batched_inputs]
        images = [(image - self.pixel_mean) / self.pixel_std for image in images]
        return ImageList.from_tensors(
            images,
            self.backbone.size_divisibility,
            padding_constraints=self.backbone.padding_constraints,
        )

    # Training

    def _losses(
        self,
        images: ImageList,
        features: dict[str, torch.Tensor],
        mask_features: torch.Tensor,
        semantic: torch.Tensor | None,
        gt: list[Instances],
    ) -> dict[str, torch.Tensor]:
        truths = [self._truth(objects, mask_features.shape[-2:]) for objects in gt]
        for objects, truth in zip(gt, truths):
            if truth is not None:
                objects.gt_centers = truth.centers
        extras, losses = self.proposal_generator(images, features, gt, self.controller)
        positives = self.positives(extras, truths)
        losses["loss_mask"] = self._mask_loss(positives, mask_features, truths)
        if semantic is not None:
            losses["loss_sem"] = semantic_loss(semantic, truths, *self.focal)
        self.mask_head._iter += 1
        return losses

    def _truth(self, objects: Instances, size: Sequence[int]) -> MaskTruth | None:
        head = self.mask_head
        padded = [length * head.in_stride for length in size]
        return mask_truth(objects, padded, head.out_stride, head.in_stride, self.num_classes)

    def positives(self, extras: dict[str, Any], truths: Sequence[MaskTruth | None]) -> Positives:
        """The positive locations that have a mask loss, of what FCOS returns in training; the only part
        of a step that waits for the device, to know how many they are."""
        targets, points = extras["targets"], extras["points"]
        positive = targets.positive.clone()
        for image, truth in enumerate(truths):
            if truth is None:
                positive[image] = False
        images, rows = positive.nonzero(as_tuple=True)
        chosen = self._chosen(images, targets.objects[images, rows], rows, extras)
        images, rows = images[chosen], rows[chosen]
        return Positives(
            objects=targets.objects[images, rows],
            levels=points.levels[rows],
            locations=points.centers[rows],
            params=extras["top"][images, :, rows],
            counts=images.bincount(minlength=len(positive)).tolist(),
        )

    def _chosen(
        self, images: torch.Tensor, objects: torch.Tensor, rows: torch.Tensor, extras: dict[str, Any]
    ) -> torch.Tensor:
        if self.topk_proposals_per_image > 0:
            probability = extras["logits"][images, :, rows].float().amax(dim=1).sigmoid()
            scores = probability * extras["quality"][images, rows].float().sigmoid()
            return best_of_each_object(images, objects, scores.detach(), self.topk_proposals_per_image)
        most = self.max_proposals if self.max_proposals > 0 else len(images)
        return random_subset(len(images), most, images.device)

    def _mask_loss(
        self,
        positives: Positives,
        mask_features: torch.Tensor,
        truths: Sequence[MaskTruth | None],
    ) -> torch.Tensor:
        objects, levels, locations, params, counts = positives
        logits = self.mask_head(mask_features, params, locations, levels, counts)
        per_image = zip(truths, objects.split(counts))
        target = [truth.masks[index] for truth, index in per_image if truth is not None]
        masks = torch.cat(target) if target else torch.empty_like(logits)  # none
        losses = dice_losses(logits.float().sigmoid(), masks)
        return losses.sum() / max(len(losses), 1)

    def _check_limits(self) -> None:
        limits = {
            "MAX_PROPOSALS": self.max_proposals,
            "TOPK_PROPOSALS_PER_IM": self.topk_proposals_per_image,
        }
        wrong = [name for name, value in limits.items() if value < -1 or value == 0]
        if wrong or all(value > 0 for value in limits.values()):
            raise ValueError(
                f"MODEL.CONDINST: {limits}; expected at most one of them above 0, and -1 for no limit"
            )
        if self.max_instances_per_pass < 1:
            raise ValueError(
                "MODEL.CONDINST.MASK_HEAD.MAX_INSTANCES_PER_PASS is "
                f"{self.max_instances_per_pass}; expected 1 or more"
            )

    # Evaluation

    def _masks(
        self,
        found: Instances,
        mask_features: torch.Tensor,
        image_size: tuple[int, int],
        output_size: tuple[int, int],
    ) -> torch.Tensor:
        """(M, H, W) bool at the size of the output, from the image's mask features (C, H', W')."""
        kernels = found.top_feat, found.locations, found.fpn_levels
        if is_recorded():  # the length of a loop would be, too. One more: ONNX has no reshape of nothing
            kernels = tuple(torch.cat([x, x.new_zeros(1, *x.shape[1:])]) for x in kernels)
            return self._masks_of(*kernels, mask_features, image_size, output_size)[:-1]
        masks = [mask_features.new_zeros(0, *output_size, dtype=torch.bool)]
        for start in range(0, len(found), self.max_instances_per_pass):
            part = [each[start : start + self.max_instances_per_pass] for each in kernels]
            masks.append(self._masks_of(*part, mask_features, image_size, output_size))
        return torch.cat(masks)

    def _masks_of(
        self,
        params: torch.Tensor,
        locations: torch.Tensor,
        levels: torch.Tensor,
        mask_features: torch.Tensor,
        image_size: tuple[int, int],
        output_size: tuple[int, int],
    ) -> torch.Tensor:
        head = self.mask_head
        logits = head(mask_features[None], params, locations, levels, [params.shape[0]])
        probabilities = aligned_bilinear(logits.float().sigmoid(), head.out_stride)
        probabilities = probabilities[..., : image_size[0], : image_size[1]]
        resized = F.interpolate(probabilities, size=output_size, mode="bilinear", align_corners=False)
        return resized[:, 0] > 0.5
