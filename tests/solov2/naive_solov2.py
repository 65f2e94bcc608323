"""SOLOv2 by plain loops in Python's float64, from the papers' formulas, independent of projects/SOLOv2."""

from __future__ import annotations

import math

import numpy as np
from naive_maps import interpolate


def downscale(mask, stride, canvas):
    """Bilinear, to rounded sizes; a half counts."""
    rows, columns = (math.floor(side / stride + 0.5) for side in mask.shape)
    found = np.zeros(canvas, dtype=bool)
    found[:rows, :columns] = interpolate(mask.astype(float), rows, columns) >= 0.5 - 1e-9
    return found


def targets(boxes, classes, masks, padded, grids, ranges, sigma, num_classes):
    """(classes of the cells of each level, entries (level, row, column, object) in the order of levels,
    objects, rows, columns)."""
    labels = [np.full((grid, grid), num_classes) for grid in grids]
    entries = []
    for level, (grid, (low, high)) in enumerate(zip(grids, ranges)):
        for k, (box, label, mask) in enumerate(zip(boxes, classes, masks)):
            width, height = box[2] - box[0], box[3] - box[1]
            pixels = [(x, y) for y, line in enumerate(mask) for x, inside in enumerate(line) if inside]
            if not low <= math.sqrt(width * height) <= high or not pixels:
                continue
            x, y = (sum(pixel[axis] for pixel in pixels) / len(pixels) for axis in (0, 1))

            def span(center, length, side):
                middle, first, last = (
                    math.floor(position / side * grid)  # noqa: B023
                    for position in (center, center - length / 2, center + length / 2)
                )
                first, last = max(first, 0, middle - 1), min(last, grid - 1, middle + 1)  # noqa: B023
                return range(first, last + 1)

            for row in span(y, sigma * height, padded[0]):
                for column in span(x, sigma * width, padded[1]):
                    labels[level][row, column] = label
                    entries.append((level, row, column, k))
    return labels, entries


def dice(mask, wanted):
    common = squares = wanted_squares = 0.0
    for p, t in zip(np.ravel(mask).tolist(), np.ravel(wanted).tolist()):
        common += p * t
        squares += p * p
        wanted_squares += t * t
    return 1 - 2 * common / ((squares + 1e-3) + (wanted_squares + 1e-3))


def point_nms(scores):
    """Of S x S scores."""
    found = np.zeros_like(scores)
    for y in range(scores.shape[0]):
        for x in range(scores.shape[1]):
            window = scores[max(y - 1, 0) : y + 1, max(x - 1, 0) : x + 1]
            found[y, x] = scores[y, x] if scores[y, x] == window.max() else 0.0
    return found


def iou(a, b):
    union = np.logical_or(a, b).sum()
    return np.logical_and(a, b).sum() / union if union else 0.0


def matrix_nms(masks, classes, kernel, sigma=2.0):
    """Factors of masks by falling score."""

    def decay(value):
        return 1 - value if kernel == "linear" else math.exp(-sigma * value**2)

    count = len(masks)
    overlap = [
        [iou(masks[i], masks[j]) if i < j and classes[i] == classes[j] else 0.0 for j in range(count)]
        for i in range(count)
    ]
    factors = []
    for j in range(count):
        factor = 1.0
        for i in range(j):
            own = max([overlap[k][i] for k in range(i)], default=0.0)
            if classes[i] != classes[j]:
                continue
            if decay(own) > 0:
                factor = min(factor, decay(overlap[i][j]) / decay(own))
        factors.append(factor)
    return factors


def mask_nms(masks, classes, threshold):
    kept = []
    for j, mask in enumerate(masks):
        better = (i for i in kept if classes[i] == classes[j])
        if all(iou(masks[i], mask) <= threshold for i in better):
            kept.append(j)
    return kept


def detect(scores, kernels, smallest, features, settings):
    """(score, class, soft mask) of each detection by falling score, from R x K scores."""
    found = []
    for cell, row in enumerate(scores):
        soft = 1 / (1 + np.exp(-np.tensordot(kernels[cell], features, axes=1)))
        inside = soft > settings["mask_threshold"]
        if inside.sum() <= smallest[cell]:
            continue
        for k, score in enumerate(row):
            if score > settings["score_threshold"]:
                found.append((score * soft[inside].mean(), k, soft))
    found = sorted(found, key=lambda item: -item[0])[: settings["pre_nms"]]
    masks = [soft > settings["mask_threshold"] for _, _, soft in found]
    classes = [k for _, k, _ in found]
    if settings["nms_type"] == "mask":
        left = [found[j] for j in mask_nms(masks, classes, settings["mask_threshold"])]
    else:
        factors = matrix_nms(masks, classes, settings["nms_kernel"], settings["nms_sigma"])
        left = [(s * factor, k, soft) for factor, (s, k, soft) in zip(factors, found)]
        left = [item for item in left if item[0] >= settings["update_threshold"]]
    return sorted(left, key=lambda item: -item[0])[: settings["max_instances"]]
