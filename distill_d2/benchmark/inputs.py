"""Generated images with objects: what a dataset mapper would return."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks


def generate_inputs(
    cfg: CfgNode, size: tuple[int, int], batch: int, objects: int, classes: int, seed: int
) -> list[dict[str, Any]]:
    """Smooth random images with random boxes, and polygons where masks are trained.

    Args:
        size: (height, width) in pixels.
        batch: number of images.
        objects: number of objects per image.
        classes: number of classes.
    """
    generator = torch.Generator().manual_seed(seed)
    return [generate_image(cfg, size, objects, classes, generator) for _ in range(batch)]


def generate_image(
    cfg: CfgNode, size: tuple[int, int], objects: int, classes: int, generator: torch.Generator
) -> dict[str, Any]:
    height, width = size
    coarse = torch.rand(1, 3, height // 16 + 2, width // 16 + 2, generator=generator) * 255
    image = F.interpolate(coarse, size, mode="bilinear", align_corners=False)[0]
    scale = torch.tensor([width, height])
    corner = torch.rand(objects, 2, generator=generator) * 0.6
    side = 0.1 + 0.3 * torch.rand(objects, 2, generator=generator)
    boxes = torch.cat([corner * scale, (corner + side) * scale], dim=1)
    instances = Instances(size)
    instances.gt_boxes = Boxes(boxes)
    instances.gt_classes = torch.randint(0, classes, (objects,), generator=generator)
    if cfg.MODEL.MASK_ON:
        polygons = [[diamond(box)] for box in boxes]
        as_bits = cfg.INPUT.MASK_FORMAT == "bitmask"
        instances.gt_masks = (
            BitMasks.from_polygon_masks(polygons, height, width) if as_bits else PolygonMasks(polygons)
        )
    return {"image": image.to(torch.uint8), "instances": instances, "height": height, "width": width}


def diamond(box: torch.Tensor) -> np.ndarray:
    """The polygon through the middles of a box's sides: x0, y0, x1, y1, ..."""
    left, top, right, bottom = box.tolist()
    x, y = (left + right) / 2, (top + bottom) / 2
    return np.array([x, top, right, y, x, bottom, left, y], dtype=np.float64)
