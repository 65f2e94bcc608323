"""Pictures of detections: panels side by side, with labels that can be read on small and large images."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from detectron2.data import Metadata
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib.figure import Figure

from ..visualize.picture import Mark, Panel, Row
from ..visualize.sheet import compose

#: By number of a class; Okabe and Ito's colors that are light enough for text on black, and two more.
_COLORS = ("#56B4E9", "#E69F00", "#F0E442", "#3DDC97", "#CC79A7", "#D55E00", "#FFFFFF", "#B69CFF")
# Pixels to which an image is scaled: its shorter side, unless the longer one becomes too long.
_SHORTER_SIDE, _LONGER_SIDE = 480, 1200


def panel(
    title: str,
    image: np.ndarray,
    found: Instances,
    classes: Sequence[str],
    metadata: Metadata | None = None,
) -> Panel:
    """Boxes with classes and scores, masks and keypoints on an image.

    Args:
        image: (H, W, 3), uint8, BGR.
        found: as a detector returns them, in pixels of the image.
        classes: names, by number.
        metadata: of keypoints: ``keypoint_names`` and ``keypoint_connection_rules``.
    """
    height, width = image.shape[:2]
    scale = min(_SHORTER_SIDE / min(height, width), _LONGER_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    shown = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    scales = torch.tensor([size[0] / width, size[1] / height])
    colors = [_COLORS[number % len(_COLORS)] for number in found.pred_classes.tolist()]
    shown = _with_shapes(shown[..., ::-1], found, scales, colors, metadata)
    boxes = (found.pred_boxes.tensor * scales.repeat(2)).tolist()
    scores = found.scores.tolist() if found.has("scores") else []
    labels = [_label(classes, number) for number in found.pred_classes.tolist()]
    labels = [f"{label} {score:.2f}" for label, score in zip(labels, scores)] or labels
    marks = [Mark(box, color, label) for box, color, label in zip(boxes, colors, labels)]
    return Panel(f"{title} ({len(marks)})", shown, marks)


def side_by_side(panels: Sequence[Panel], header: Sequence[str]) -> Figure:
    """Panels of one image as a figure, which can be saved."""
    return compose([Row(list(panels))], header)


def _label(classes: Sequence[str], number: int) -> str:
    return classes[number] if number < len(classes) else f"class {number}"


def _with_shapes(
    image: np.ndarray,
    found: Instances,
    scales: torch.Tensor,
    colors: Sequence[str],
    metadata: Metadata | None,
) -> np.ndarray:
    """The image, RGB, under masks and keypoints, which are scaled to it."""
    masks = keypoints = None
    if found.has("pred_masks"):
        masks = [_resized(mask, image.shape[:2]) for mask in found.pred_masks.numpy()]
    if found.has("pred_keypoints"):
        keypoints = found.pred_keypoints.numpy() * [*scales.tolist(), 1.0]
    if not colors or (masks is None and keypoints is None):
        return np.ascontiguousarray(image)
    drawing = Visualizer(np.ascontiguousarray(image), metadata)
    drawing.overlay_instances(masks=masks, keypoints=keypoints, assigned_colors=list(colors), alpha=0.4)
    return drawing.get_output().get_image()


def _resized(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return cv2.resize(mask.astype(np.uint8), size[::-1], interpolation=cv2.INTER_NEAREST)
