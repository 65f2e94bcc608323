"""SOLOv2s and batches for tests: five levels, three classes, images 96 pixels wide."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from distill_d2.projects.solov2 import SOLOv2, tiny

from distill_d2.testing import CLASSES

GRIDS = [10, 8, 6, 4, 3]
RANGES = [[1, 24], [12, 48], [24, 96], [48, 192], [96, 512]]
CELLS = sum(grid**2 for grid in GRIDS)
PADDED = (64, 96)  # of ``batch``


def config(width: int = 8, **keys) -> CfgNode:
    """On a SmallResNet, on the CPU; ``keys`` are of MODEL.SOLOV2."""
    cfg = tiny.config(width)
    for key, value in keys.items():
        cfg.MODEL.SOLOV2[key] = value
    return cfg


def solov2(seed: int = 0, lively: bool = True, **keys) -> SOLOv2:
    """Of ``config(**keys)``; ``lively``: scores and masks differ from cell to cell, unlike those of a new
    network."""
    torch.manual_seed(seed)
    model = build_model(config(**keys))
    if lively:
        for layer in (model.ins_head.cate_pred, model.ins_head.kernel_pred):
            torch.nn.init.normal_(layer.weight, std=0.3)
        torch.nn.init.constant_(model.ins_head.cate_pred.bias, 0.0)
    return model


def random_objects(
    random: np.random.Generator, count: int, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (G, 4) of 4 pixels to the whole image, and an ellipse in each as a mask (G, H, W)."""
    height, width = size
    sides = 4 + random.uniform(0, 1, (count, 2)) ** 2 * (np.array([width, height]) - 4)
    corner = random.uniform(0, 1, (count, 2)) * (np.array([width, height]) - sides)
    boxes = np.concatenate([corner, corner + sides], axis=1).astype(np.float32)
    y, x = np.mgrid[:height, :width] + 0.5
    center, half = corner + sides / 2, sides / 2
    masks = [((x - cx) / w) ** 2 + ((y - cy) / h) ** 2 <= 1 for (cx, cy), (w, h) in zip(center, half)]
    return boxes, np.array(masks, dtype=bool).reshape(count, height, width)


def instances(boxes, classes, masks, size) -> Instances:
    found = Instances(tuple(size))
    found.gt_boxes = Boxes(torch.as_tensor(np.array(boxes), dtype=torch.float32).view(-1, 4))
    found.gt_classes = torch.as_tensor(classes, dtype=torch.int64)
    found.gt_masks = BitMasks(torch.as_tensor(np.array(masks)).view(-1, *size))
    return found


def batch(*objects: int, polygons: bool = False, seed: int = 0) -> list[dict]:
    """Random images, each 8 pixels lower than the one before, with these numbers of objects."""
    random = np.random.default_rng(seed)
    inputs = []
    for index, count in enumerate(objects):
        shape = (PADDED[0] - 8 * index, PADDED[1])
        boxes, masks = random_objects(random, count, shape)
        truth = instances(boxes, random.integers(0, CLASSES, count), masks, shape)
        if polygons:
            truth.gt_masks = PolygonMasks([[_diamond(box)] for box in boxes])
        image = torch.from_numpy(random.integers(0, 256, (3, *shape), dtype=np.uint8))
        inputs.append({"image": image, "instances": truth})
    return inputs


def _diamond(box: Sequence[float]) -> np.ndarray:
    x1, y1, x2, y2 = map(float, box)
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    return np.array([x, y1, x2, y, x, y2, x1, y])
