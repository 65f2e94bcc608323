"""FCOS' formulas written with loops, independently of projects/FCOS."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def locations(height: int, width: int, stride: int) -> list[tuple[float, float]]:
    start = stride // 2
    return [(j * stride + start, i * stride + start) for i in range(height) for j in range(width)]


def distances(x: float, y: float, box: Sequence[float]) -> tuple[float, ...]:
    return (x - box[0], y - box[1], box[2] - x, box[3] - y)


def assign(points, boxes, bounds, radius, centers=None) -> list[int | None]:
    """Of points (x, y, stride, level) the index of the box, or None."""
    found = []
    for x, y, stride, level in points:
        best, best_area = None, math.inf
        for index, box in enumerate(boxes):
            ltrb = distances(x, y, box)
            if min(ltrb) <= 0 or not bounds[level][0] <= max(ltrb) <= bounds[level][1]:
                continue
            if radius is not None:
                cx, cy = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
                if centers is not None:
                    cx, cy = centers[index]
                reach = radius * stride
                region = (
                    max(cx - reach, box[0]), max(cy - reach, box[1]),
                    min(cx + reach, box[2]), min(cy + reach, box[3]),
                )  # fmt: skip
                if min(distances(x, y, region)) <= 0:
                    continue
            area = (box[2] - box[0]) * (box[3] - box[1])
            if area < best_area:
                best, best_area = index, area
        found.append(best)
    return found


def ious(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """IoU, smoothed, and GIoU of two boxes around one location, by the distances to their sides."""
    area = [(x[0] + x[2]) * (x[1] + x[3]) for x in (a, b)]
    low, high = [min(p, q) for p, q in zip(a, b)], [max(p, q) for p, q in zip(a, b)]
    common, hull = ((x[0] + x[2]) * (x[1] + x[3]) for x in (low, high))
    union = sum(area) - common
    iou = (common + 1) / (union + 1)
    return iou, iou - (hull - union) / hull


def centerness(ltrb: Sequence[float]) -> float:
    left, top, right, bottom = ltrb
    return math.sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def bce(logit: float, target: float) -> float:
    p = sigmoid(logit)
    return -target * math.log(p) - (1 - target) * math.log(1 - p)


def focal(logits, label: int, alpha: float, gamma: float) -> float:
    """Of one location's K logits; label K is background."""
    total = 0.0
    for k, logit in enumerate(logits):
        p, is_class = sigmoid(logit), k == label
        right = p if is_class else 1 - p
        weight = alpha if is_class else 1 - alpha
        total += weight * (1 - right) ** gamma * -math.log(right)
    return total


def losses(
    logits, ltrb, quality, labels, target_ltrb, *, alpha=0.25, gamma=2.0, box="giou", kind="ctrness"
):
    """The class loss before its normalizer, and the two others; per location, labels K where
    background."""
    background = len(logits[0])
    rows = [i for i, label in enumerate(labels) if label != background]
    classes = sum(focal(logits[i], labels[i], alpha, gamma) for i in range(len(labels)))
    count = max(len(rows), 1)
    weights = {i: centerness(target_ltrb[i]) for i in rows}
    box_loss, quality_loss = 0.0, 0.0
    for i in rows:
        iou, giou = ious(ltrb[i], target_ltrb[i])
        loss = {"giou": 1 - giou, "linear_iou": 1 - iou, "iou": -math.log(iou)}[box]
        box_loss += loss * (weights[i] if kind == "ctrness" else 1.0)
        quality_loss += bce(quality[i], weights[i] if kind == "ctrness" else iou)
    divisor = max(sum(weights.values()), 1e-6) if kind == "ctrness" else count
    return classes, box_loss / divisor, quality_loss / count, count


def detect(levels, *, threshold, with_quality, before, nms, after):
    """Of levels (logits (P, K), ltrb (P, 4), quality (P), locations, stride): (score, class, level,
    location, box) by falling score."""
    candidates = []
    for index, (logits, ltrb, quality, places, stride) in enumerate(levels):
        of_level = []
        for row in range(len(places)):
            q = sigmoid(quality[row])
            for k, logit in enumerate(logits[row]):
                p = sigmoid(logit)
                if (p * q if with_quality else p) > threshold:
                    x, y = places[row]
                    left, top, right, bottom = (stride * d for d in ltrb[row])
                    box = (x - left, y - top, x + right, y + bottom)
                    of_level.append((math.sqrt(p * q), k, index, places[row], box))
        candidates += sorted(of_level, key=lambda d: -d[0])[:before]
    kept = []
    for candidate in sorted(candidates, key=lambda d: -d[0]):
        if all(k[1] != candidate[1] or box_iou(k[4], candidate[4]) <= nms for k in kept):
            kept.append(candidate)
    return kept[:after]


def box_iou(a, b) -> float:
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0.0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0.0)
    common = width * height
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def deform_conv(x, offset, mask, weight, bias) -> np.ndarray:
    """3x3, stride 1, padding 1: x (C, H, W), offset (18, H, W) as dy, dx per tap, mask (9, H, W)."""
    channels, height, width = x.shape
    out = np.zeros((len(weight), height, width))

    def at(c, i, j):
        return x[c, i, j] if 0 <= i < height and 0 <= j < width else 0.0

    def sample(c, y, z):
        i, j = math.floor(y), math.floor(z)
        u, v = y - i, z - j
        return (
            (1 - u) * (1 - v) * at(c, i, j) + (1 - u) * v * at(c, i, j + 1)
            + u * (1 - v) * at(c, i + 1, j) + u * v * at(c, i + 1, j + 1)
        )  # fmt: skip

    for o in range(len(weight)):
        for i in range(height):
            for j in range(width):
                total = bias[o]
                for tap in range(9):
                    y = i - 1 + tap // 3 + offset[2 * tap, i, j]
                    z = j - 1 + tap % 3 + offset[2 * tap + 1, i, j]
                    for c in range(channels):
                        total += weight[o, c, tap // 3, tap % 3] * mask[tap, i, j] * sample(c, y, z)
                out[o, i, j] = total
    return out
