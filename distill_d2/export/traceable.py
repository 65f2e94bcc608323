"""detectron2's parts that an export cannot record, replaced while it does. The values stay the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from detectron2.export.torchscript_patch import patch_builtin_len
from detectron2.layers import mask_ops
from detectron2.modeling.roi_heads import keypoint_head


@contextlib.contextmanager
def traceable() -> Iterator[None]:
    """Inside, torch.jit.trace and torch.onnx.export record detectors for images of any size."""
    with (
        patch_builtin_len(),
        mock.patch.object(mask_ops, "_paste_masks_tensor_shape", paste_masks),
        mock.patch.object(mask_ops, "paste_masks_in_image", paste_masks),
        mock.patch.object(keypoint_head, "heatmaps_to_keypoints", heatmaps_to_keypoints),
    ):
        yield


def paste_masks(
    masks: torch.Tensor, boxes: torch.Tensor, image_shape: tuple[Any, Any], threshold: float = 0.5
) -> torch.Tensor:
    """``paste_masks_in_image`` of detectron2 for all masks together."""
    pasted, _ = mask_ops._do_paste_mask(masks[:, None], boxes, *image_shape, skip_empty=False)
    return pasted >= threshold


@torch.jit.script_if_tracing
def heatmaps_to_keypoints(maps: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
    """detectron2's, from heatmaps (N, K, P, P) and boxes (N, 4) to (N, K, 4), without indices that are tensors."""
    sizes = (rois[:, 2:] - rois[:, :2]).clamp(min=1)
    whole = sizes.ceil()
    count = maps.shape[1]
    points = maps.new_zeros(maps.shape[0], count, 4)
    for i in range(maps.shape[0]):
        roi = maps[i : i + 1]
        size = (int(whole[i, 1]), int(whole[i, 0]))
        enlarged = F.interpolate(roi, size=size, mode="bicubic", align_corners=False)
        width = enlarged.shape[3]
        logit, place = enlarged.reshape(1, count, -1).max(dim=2)  # (1, K)
        score = (roi.reshape(1, count, -1) - logit[:, :, None]).exp().sum(dim=2).reciprocal()
        x = (place % width + 0.5) * (sizes[i, 0] / whole[i, 0]) + rois[i, 0]
        y = (place // width + 0.5) * (sizes[i, 1] / whole[i, 1]) + rois[i, 1]
        points[i] = torch.stack([x[0], y[0], logit[0], score[0]], dim=1)
    return points
