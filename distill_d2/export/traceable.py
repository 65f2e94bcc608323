"""detectron2's parts that an export cannot record, replaced while it does. What they compute stays the same."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from detectron2.export.torchscript_patch import patch_builtin_len
from detectron2.layers import mask_ops
from detectron2.modeling import poolers
from detectron2.modeling.proposal_generator import proposal_utils
from detectron2.modeling.roi_heads import keypoint_head
from detectron2.structures import Boxes, ImageList, Instances
from torchvision.ops import boxes as box_ops

_replace = mock.patch.object


@contextlib.contextmanager
def traceable() -> Iterator[None]:
    """Inside, torch.jit.trace and torch.onnx.export record detectors, for images of any size."""
    with (
        torch.no_grad(),
        patch_builtin_len(),
        _replace(mask_ops, "_paste_masks_tensor_shape", _paste_masks),
        _replace(mask_ops, "paste_masks_in_image", _paste_masks),
        _replace(keypoint_head, "heatmaps_to_keypoints", _heatmaps_to_keypoints),
    ):
        yield


@contextlib.contextmanager
def exportable() -> Iterator[None]:
    """Inside, torch.export records detectors, for one image of a fixed size. It knows no numbers of detections,
    so nothing may depend on one: not on whether there are any, nor on whether all are finite."""
    with (
        traceable(),
        _replace(ImageList, "from_tensors", staticmethod(_from_one_tensor)),
        _replace(Boxes, "__init__", _init_boxes),
        _replace(Instances, "set", lambda self, name, value: self._fields.update({name: value})),
        _replace(box_ops, "batched_nms", _batched_nms),
        _replace(proposal_utils, "_is_tracing", lambda: True),
        _replace(poolers, "convert_boxes_to_pooler_format", _rows_of_pooler),
        _replace(keypoint_head, "heatmaps_to_keypoints", _refuse_keypoints),
        _replace(torch.Tensor, "all", _all),
    ):
        yield


def _paste_masks(
    masks: torch.Tensor, boxes: torch.Tensor, image_shape: tuple[Any, Any], threshold: float = 0.5
) -> torch.Tensor:
    """All masks together; detectron2 loops over them."""
    pasted, _ = mask_ops._do_paste_mask(masks[:, None], boxes, *image_shape, skip_empty=False)
    return pasted >= threshold


@torch.jit.script_if_tracing
def _heatmaps_to_keypoints(maps: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
    """From heatmaps (N, K, P, P) and boxes (N, 4) to x, y, logit and score (N, K, 4). ONNX has no number of
    dimensions inside a loop, which detectron2's indices need."""
    sizes = (rois[:, 2:] - rois[:, :2]).clamp(min=1)
    whole = sizes.ceil()
    count = maps.shape[1]
    points = maps.new_zeros(maps.shape[0], count, 4)
    for i in range(maps.shape[0]):
        roi = maps[i : i + 1]
        size = (int(whole[i, 1]), int(whole[i, 0]))
        enlarged = F.interpolate(roi, size=size, mode="bicubic", align_corners=False)
        width = enlarged.shape[3]
        logit, place = enlarged.reshape(1, count, -1).max(dim=2)
        score = (roi.reshape(1, count, -1) - logit[:, :, None]).exp().sum(dim=2).reciprocal()
        x = (place % width + 0.5) * (sizes[i, 0] / whole[i, 0]) + rois[i, 0]
        y = (place // width + 0.5) * (sizes[i, 1] / whole[i, 1]) + rois[i, 1]
        points[i] = torch.stack([x[0], y[0], logit[0], score[0]], dim=1)
    return points


def _from_one_tensor(
    tensors: list[torch.Tensor],
    size_divisibility: int = 0,
    pad_value: float = 0.0,
    padding_constraints: dict[str, int] | None = None,
) -> ImageList:
    """``ImageList.from_tensors``, whose sizes are tensors, with sizes that are numbers."""
    (image,) = tensors
    constraints = padding_constraints or {}
    divisor = constraints.get("size_divisibility", size_divisibility) or 1
    square = constraints.get("square_size", 0)
    height, width = image.shape[-2:]
    bottom, right = (-(-(square or side) // divisor) * divisor - side for side in (height, width))
    padded = F.pad(image, (0, right, 0, bottom), value=pad_value)
    return ImageList(padded[None], [(height, width)])


def _init_boxes(self: Boxes, tensor: torch.Tensor) -> None:
    self.tensor = tensor.to(torch.float32)


def _batched_nms(
    boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor, iou_threshold: float
) -> torch.Tensor:
    """torchvision's with its trick for small numbers: classes are moved so far apart that they do not overlap."""
    distance = F.pad(boxes.flatten(), (0, 1)).max() + 1  # also without boxes
    moved = boxes + (idxs.to(boxes) * distance)[:, None]
    # torch.export takes it that two boxes or more are kept: two of no area, which overlap none, come last.
    moved, scores = F.pad(moved, (0, 0, 0, 2)), F.pad(scores, (0, 2), value=-torch.inf)
    return torch.ops.torchvision.nms(moved, scores, iou_threshold)[:-2]


def _rows_of_pooler(box_lists: list[Boxes]) -> torch.Tensor:
    """The boxes of one image (N, 5), with its number, 0, before them."""
    (boxes,) = box_lists
    return F.pad(boxes.tensor, (1, 0))


def _refuse_keypoints(maps: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
    raise ValueError(
        "keypoints are found in a loop over the objects, whose number torch.export does not know"
    )


def _all(self: torch.Tensor, *args: Any, **options: Any) -> Any:
    """Without arguments, of all elements, True: the question is whether predictions are finite."""
    return torch.all(self, *args, **options) if args or options else True
