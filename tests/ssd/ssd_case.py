"""SSDs and batches for tests; the networks are narrow where a test does not need their full width."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from distill_d2.projects.ssd import SSD

from distill_d2 import add_distill_config
from distill_d2.config import load_yaml

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# By short names: the original, the teacher, the student.
NETWORKS = {"A": "Base-SSD300-VGG16.yaml", "B": "Base-SSD-VGG16-teacher.yaml", "C": "Base-SSD.yaml"}
NARROW = {"A": 0.125, "B": 0.125, "C": 0.25}


def config(network: str = "C", **keys) -> CfgNode:
    """A network's packaged config, on the CPU; ``keys`` are of MODEL.SSD."""
    cfg = get_cfg()
    add_distill_config(cfg)
    load_yaml(cfg, str(CONFIGS / NETWORKS[network]))
    cfg.MODEL.DEVICE = "cpu"
    for key, value in keys.items():
        cfg.MODEL.SSD[key] = value
    return cfg


def ssd(network: str = "C", **keys) -> SSD:
    """A narrow network, with random weights."""
    return build_model(config(network, **{"WIDTH": NARROW[network], **keys}))


def instances(boxes: Sequence[Sequence[float]], classes: Sequence[int], size: int = 300) -> Instances:
    return Instances(
        (size, size),
        gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).view(-1, 4)),
        gt_classes=torch.tensor(classes, dtype=torch.int64),
    )


def batch(*objects: int, size: int = 300, classes: int = 20, seed: int = 0):
    """Random images, with the given numbers of objects."""
    random = np.random.default_rng(seed)
    inputs = []
    for count in objects:
        corner, side = random.uniform(0, 0.5, (count, 2)), random.uniform(0.1, 0.5, (count, 2))
        boxes = np.concatenate([corner, corner + side], axis=1) * size
        inputs.append(
            {
                "image": torch.from_numpy(random.integers(0, 256, (3, size, size), dtype=np.uint8)),
                "instances": instances(boxes, random.integers(0, classes, count), size),
                "height": size,
                "width": size,
            }
        )
    return inputs


def levels(model: SSD):
    """What the model's head reads of a black image."""
    with torch.no_grad():
        features = model.backbone(torch.zeros(1, 3, *[model.anchor_generator.size] * 2))
    return [features[name] for name in model.head_in_features]


def maps(widths: Sequence[int]):
    """Empty levels of these widths: all that prior boxes depend on."""
    return [torch.empty(1, 1, width, width) for width in widths]


#: Of the levels that the head reads, in cells.
WIDTHS = {"A": (38, 19, 10, 5, 3, 1), "B": (19, 10, 5, 3, 2, 1), "C": (19, 10, 5, 3, 2, 1)}
